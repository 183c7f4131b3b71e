"""Owns the memory of a model's tensors: giving vLLM's own back, and showing an arena's in its place."""

import math
import weakref
from collections.abc import Mapping

import torch
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.arena.host import HostWeightArena
from ramet.srt.utils import host_memory
from ramet.srt.weights.manifest import WeightEntry

from ramet_vllm.model_layout import ModelTensor


class ModelMemory:
    """The parameters and buffers of one model, each by its first name."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters: dict[str, torch.nn.Parameter] = dict(model.named_parameters())
        self.buffers: dict[str, torch.Tensor] = dict(model.named_buffers())
        self._layouts = {name: (one.shape, one.dtype, one.device) for name, one in self.parameters.items()}

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """All that a model's loading may write to."""
        return {**{name: one for name, one in self.buffers.items() if one.numel()}, **self.filled_parameters}

    @property
    def filled_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Those that hold anything."""
        return {name: one for name, one in self.parameters.items() if one.numel()}

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def describe(self, written: Mapping[str, object]) -> list[ModelTensor]:
        """What has to be filled: every parameter, and those buffers that loading writes to.

        Raises:
            ValueError: for a parameter that does not lie row by row, or on another device than the others.
        """
        for name, one in self.filled_parameters.items():
            if one.device != self.device:
                raise ValueError(f"vLLM keeps {name} on {one.device}, and others on {self.device}: weights from an "
                                 "instance go to one device alone, so leave offloading out")  # fmt: skip
            if not one.is_contiguous():
                raise ValueError(f"vLLM lays {name} out in another order than its rows: it can't be filled by rows")
        chosen = {**self.filled_parameters, **{name: one for name, one in self.buffers.items() if name in written}}
        return [ModelTensor(name, str(one.dtype), tuple(one.shape)) for name, one in chosen.items()]

    def give_back(self) -> None:
        """Free the parameters' memory, so that there is room for the arena."""
        for parameter in self.parameters.values():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def take_again(self) -> None:
        """Have memory of vLLM's own kind again, of no content."""
        for name, (shape, dtype, device) in self._layouts.items():
            self.parameters[name].data = torch.empty(shape, dtype=dtype, device=device)

    def show(self, arena: WeightArena) -> None:
        """Make the parameters views into a filled arena, and copy what belongs to buffers, whose place others know."""
        for entry in arena.manifest.entries:
            if entry.name in self.parameters:
                self.parameters[entry.name].data = _view(arena, entry)
            else:
                self.buffers[entry.name].copy_(arena.tensor(entry))


def _view(arena: WeightArena, entry: WeightEntry) -> torch.Tensor:
    """An entry as a tensor. In host memory its pages go back as soon as nobody has it any more.

    vLLM packs weights into another layout one by one and drops them: without that all would be there twice.
    """
    if not isinstance(arena, HostWeightArena) or not entry.nbytes:
        return arena.tensor(entry)
    dtype = getattr(torch, entry.dtype)
    buffer = host_memory.view_memory(arena.address + entry.offset, entry.nbytes)
    weakref.finalize(buffer, arena.drop_pages, entry.offset, entry.offset + entry.nbytes).atexit = False
    return torch.frombuffer(buffer, dtype=dtype, count=math.prod(entry.shape)).view(entry.shape)
