"""Builds every rank of a topology in one process, and checkpoint tensors for all of them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.quantization.declare import declare_quantised
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.checkpoint_loader import OpenCheckpoint
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.model_loader.loader import get_model_loader
from ramet.srt.models.decoder import DecoderForCausalLM
from ramet.srt.weights.copy_op import CopyOp
from ramet.srt.weights.manifest import WeightManifest, build_weight_manifest
from torch import nn

TOPOLOGIES = [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4)]  # (tp_size, ep_size)


def all_ranks(tp_size: int, ep_size: int = 1) -> list[ParallelConfig]:
    """The coordinates of every rank."""
    return [ParallelConfig.of_rank(rank, tp_size=tp_size, ep_size=ep_size) for rank in range(tp_size)]


def ranks_of(*, tp_size: int = 1, pp_size: int = 1, dp_size: int = 1, ep_size: int = 1) -> list[ParallelConfig]:
    """The coordinates of every rank, in the order of their world ranks."""
    sizes = {"tp_size": tp_size, "pp_size": pp_size, "dp_size": dp_size, "ep_size": ep_size}
    return [ParallelConfig.of_rank(rank, **sizes) for rank in range(dp_size * pp_size * tp_size)]


def topology_name(topology: tuple[int, int]) -> str:
    return "tp{}ep{}".format(*topology)


def build_model(folder: str | Path, parallel: ParallelConfig, quantization: str | None = None) -> nn.Module:
    """One rank's model on the meta device."""
    config = ModelConfig.from_path(str(folder), quantization=quantization)
    model = DecoderForCausalLM(config, getattr(torch, config.dtype), parallel)
    if config.quantization_config is not None:
        declare_quantised(model, config.quantization_config)
    return model


def make_manifest(model: nn.Module) -> WeightManifest:
    return build_weight_manifest(
        model.named_parameters(remove_duplicate=False),
        model_name="random",
        revision="",
        dtype=model.config.dtype,
        quantization=model.config.quantization,
        role="target",
        parallel=model.parallel,
        dimensions=model.config.dimensions,
        is_tied=model.config.tie_word_embeddings,
    )


def checkpoint_shapes(modules: Iterable[nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shapes that checkpoint tensors must have for the boxes of all ranks together."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in modules:
        for parameter in module.parameters():
            for box in parameter.boxes:
                reach = tuple(stop for _, stop in box.source)
                shapes[box.checkpoint_name] = tuple(map(max, reach, shapes.get(box.checkpoint_name, reach)))
    return shapes


def random_checkpoint(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}


def load_from_disk(
    folder: str | Path,
    manifest: WeightManifest,
    open_checkpoint: OpenCheckpoint = CheckpointSource,
    device: str = "cpu",
) -> WeightArena:
    """A rank's arena filled from the files in `folder`."""
    arena = allocate_arena(manifest, device)
    get_model_loader(LoadConfig(), open_checkpoint=open_checkpoint).load_weights(manifest, arena, str(folder))
    return arena


def execute(ops: Iterable[CopyOp], sources: Sequence[memoryview], target: memoryview) -> None:
    """Copy as planned, byte by byte: no transport that could hide a mistake of the plan."""
    for op in ops:
        for row in op.rows():
            source = sources[row.source][row.source_offset : row.source_offset + row.row_nbytes]
            target[row.target_offset : row.target_offset + row.row_nbytes] = source
