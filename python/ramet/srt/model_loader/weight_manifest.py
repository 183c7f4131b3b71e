"""Owns the description of what is in a weight arena: pure data, readable and comparable without torch."""

import msgspec

from ramet.srt.configs.parallel_config import ParallelConfig


class WeightBox(msgspec.Struct, frozen=True, array_like=True):
    """Which slice of which checkpoint tensor fills which slice of an arena tensor.

    `source` and `target` hold one (start, stop) pair per dimension of the checkpoint tensor and of
    the arena tensor. With dimensions of extent 1 dropped, both sides have the same shape.
    """

    checkpoint_name: str
    source: tuple[tuple[int, int], ...]
    target: tuple[tuple[int, int], ...]


class WeightEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor in the arena. What no box covers is padding and holds zeros."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    boxes: tuple[WeightBox, ...]
    aliases: tuple[str, ...] = ()


class WeightManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank's arena holds, and of which model it is a part."""

    model_name: str
    revision: str
    dtype: str
    quantization: str
    role: str
    parallel: ParallelConfig
    arena_nbytes: int
    entries: tuple[WeightEntry, ...]
