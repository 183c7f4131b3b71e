"""Owns the layers that `ramet tune` runs: one of each shape that a rank's part of a model has, with made-up weights."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ramet.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from ramet.srt.layers.mlp import GatedMLP
from ramet.srt.layers.moe import SparseMoeBlock
from ramet.srt.layers.quantization.weight import QuantizedWeight, weight_of
from ramet.srt.layers.vocab_parallel_embedding import ParallelLMHead
from ramet.srt.model_loader.checkpoint.whole_model import SCALE_SUFFIXES

KINDS = (SparseMoeBlock, GatedMLP, MergedColumnParallelLinear, RowParallelLinear, ParallelLMHead)
COLD_BYTES = 256 << 20  # of the copies of a layer that take turns: more than caches hold
MOST_COPIES = 32
FEW_ROWS = 512  # rows beyond that are not those of an output head


@dataclass
class LayerTrial:
    """Copies of a layer that take turns, so that each reads its weights from memory as it does in a model."""

    name: str
    copies: list[nn.Module]
    input_size: int
    dtype: torch.dtype
    device: torch.device

    def run(self, num_rows: int) -> Callable[[int], torch.Tensor]:
        """What computes one copy's output, for inputs that are always the same."""
        generator = torch.Generator(self.device).manual_seed(num_rows)
        x = torch.randn((num_rows, self.input_size), generator=generator, dtype=self.dtype, device=self.device)

        def compute(turn: int) -> torch.Tensor:
            layer = self.copies[turn % len(self.copies)]
            return layer.logits(x) if isinstance(layer, ParallelLMHead) else layer(x)

        return compute

    def takes(self, num_rows: int) -> bool:
        return num_rows <= FEW_ROWS or not isinstance(self.copies[0], ParallelLMHead)


def layer_trials(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[LayerTrial]:
    """One after the other, each with memory of its own while it is looked at.

    Args:
        model: of one rank, on the meta device.
    """
    seen = set()
    for name, layer in _layers(model):
        shapes = tuple((part, tuple(weight.shape), weight.dtype) for part, weight in layer.named_parameters())
        if (type(layer), shapes) in seen:
            continue
        seen.add((type(layer), shapes))
        nbytes = sum(weight.nbytes for weight in layer.parameters())
        number = max(1, min(MOST_COPIES, -(-COLD_BYTES // nbytes)))
        copies = [_with_weights(layer, device, seed) for seed in range(number)]
        yield LayerTrial(name, copies, _input_size(layer), dtype, device)


def _layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost of the KINDS."""
    for name, module in model.named_children():
        if isinstance(module, KINDS):
            yield f"{prefix}{name}", module
        else:
            yield from _layers(module, f"{prefix}{name}.")


def _input_size(layer: nn.Module) -> int:
    if isinstance(layer, SparseMoeBlock):
        return layer.gate.weight.shape[1]
    if isinstance(layer, GatedMLP):
        layer = layer.gate_up_proj
    weight = weight_of(layer, "weight")
    return weight.layout.num_columns if isinstance(weight, QuantizedWeight) else weight.shape[1]


def _with_weights(layer: nn.Module, device: torch.device, seed: int) -> nn.Module:
    """A copy with weights on the device."""
    made = copy.deepcopy(layer)
    generator = torch.Generator(device).manual_seed(seed)
    for path, module in made.named_modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            declared = getattr(layer.get_submodule(path), name)
            values = _made_up(weight, declared.boxes[0].checkpoint_name, generator, device)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    return made


def _made_up(weight: torch.Tensor, name: str, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Small numbers; scales above zero; packed numbers of any value, but for those that say where others are."""
    is_scale = name.endswith(SCALE_SUFFIXES)
    if weight.dtype.is_floating_point:
        values = torch.empty(weight.shape, dtype=torch.float32, device=device).uniform_(
            0.01 if is_scale else -0.04, 0.04, generator=generator
        )
        return values.to(weight.dtype)
    if name.endswith("g_idx"):
        return torch.zeros(weight.shape, dtype=weight.dtype, device=device)
    low, high = (118, 122) if is_scale else (0, 256)  # exponents of small powers of two
    nbytes = weight.numel() * weight.element_size()
    raw = torch.randint(low, high, (nbytes,), dtype=torch.uint8, generator=generator, device=device)
    return raw.view(weight.dtype).view(weight.shape)
