"""Owns what of a checkpoint is not copied as it is: weights that are quantised while they load, and some scales.

An arena's quantised entry `X.weight`, one matrix or a stack of them, has siblings: `X.weight_scale` with one scale for
each row, say. The values of a checkpoint of quantised weights are copied, and so are the others where they have the
arena's shape and a type that can be cast on the way; scales that don't are spread or decoded. Plain weights are
quantised to fp8 by row. Matrices whose rows are a file's columns are turned round: to copy them would be an operation
for each number. Reads nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from ramet.srt.model_loader.checkpoint.cache_scales import is_cache_scale
from ramet.srt.model_loader.checkpoint.checks import PLAIN_FLOATS, Tensors
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo
from ramet.srt.model_loader.checkpoint.whole_model import grids_of
from ramet.srt.weights.boxes import Region
from ramet.srt.weights.manifest import WeightBox, WeightEntry, WeightManifest, element_size
from ramet.srt.weights.planner import CASTABLE_DTYPES

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class QuantizeJob:
    """Some whole rows of a plain checkpoint matrix, to be quantised into a slice of an arena's entry."""

    path: str
    info: TensorInfo  # [num_rows, num_columns]
    rows: tuple[int, int]
    columns: tuple[int, int]  # those that this rank keeps
    weight: WeightEntry
    scale: WeightEntry
    target_start: tuple[int, ...]  # [..., row, column]


@dataclass(frozen=True)
class ScaleJob:
    """A checkpoint's scales, to be brought to float32 and to the shape of a slice of an arena's entry."""

    path: str
    info: TensorInfo  # one number for all of the box, or a tensor that the box is a slice of
    box: WeightBox
    scale: WeightEntry


@dataclass(frozen=True)
class TurnJob:
    """Parts of a file that lie in one another, each to be turned round into a slice of an arena's entry."""

    path: str
    parts: tuple[
        tuple[TensorInfo, Region], ...
    ]  # each with its place in the entry, which may have more dimensions in front
    entry: WeightEntry


@dataclass(frozen=True)
class CacheScaleJob:
    """A scale of the KV cache, which is 1 where the files have none."""

    found: tuple[str, TensorInfo] | None  # the file, and where in it
    box: WeightBox
    scale: WeightEntry


Job = QuantizeJob | ScaleJob | TurnJob | CacheScaleJob


def split_manifest(manifest: WeightManifest, tensors: Tensors, *, is_online: bool) -> tuple[WeightManifest, list[Job]]:
    """What of a manifest is copied, and what takes more than a copy.

    Args:
        is_online: whether the fp8 weights are quantised while they are read.

    Returns:
        The manifest without the entries that are not copied, and the jobs for those.

    Raises:
        ValueError: if a tensor is missing or has a shape or type that can't be quantised.
    """
    entries = {entry.name: entry for entry in manifest.entries}
    jobs: list[Job] = []
    done: set[str] = set()
    for name, grids in grids_of(entries).items():
        if is_online:
            weight, scale = entries[name], entries[grids[0]]
            done |= {weight.name, scale.name}
            for box in weight.boxes:
                jobs.extend(_quantize_jobs(box, weight, scale, tensors))
            continue
        for grid in (entries[grid] for grid in grids):
            if grid.dtype == "float32" and any(not _is_copied(box, tensors) for box in grid.boxes):
                done.add(grid.name)
                jobs.extend(ScaleJob(*tensors[box.checkpoint_name], box, grid) for box in grid.boxes)
    for entry in manifest.entries:
        if entry.boxes and is_cache_scale(entry.boxes[0].checkpoint_name):
            done.add(entry.name)
            jobs.extend(CacheScaleJob(tensors.get(box.checkpoint_name), box, entry) for box in entry.boxes)
        if entry.name not in done and any(_is_turned(box, tensors) for box in entry.boxes):
            done.add(entry.name)
            jobs.extend(_turn_jobs(entry, tensors))
    rest = tuple(entry for entry in manifest.entries if entry.name not in done)
    return msgspec.structs.replace(manifest, entries=rest), jobs


def _is_copied(box: WeightBox, tensors: Tensors) -> bool:
    """Whether scales need nothing but a cast."""
    info = tensors[box.checkpoint_name][1]
    reach = tuple(stop for _, stop in box.source)
    has_room = len(info.shape) == len(reach) and all(a >= b for a, b in zip(info.shape, reach, strict=True))
    return info.dtype in PLAIN_FLOATS and has_room


def _is_turned(box: WeightBox, tensors: Tensors) -> bool:
    """Whether neighbours in a row of the box lie far from each other in the file."""
    found = tensors.get(box.checkpoint_name)
    return found is not None and found[1].strides is not None and found[1].strides[-1] != element_size(found[1].dtype)


def _turn_jobs(entry: WeightEntry, tensors: Tensors) -> list[TurnJob]:
    """One for each piece of a file, in the order of the boxes: a gate lies among the columns of its up matrix."""
    jobs: list[TurnJob] = []
    for box in entry.boxes:
        path, info = tensors[box.checkpoint_name]
        if info.dtype != entry.dtype and not {info.dtype, entry.dtype} <= set(CASTABLE_DTYPES):
            raise ValueError(f"{path}: {box.checkpoint_name} is {info.dtype}, {entry.dtype} here")
        for dim, (start, stop) in enumerate(box.source):
            info = info.part(dim, start, stop)
        for part, target in _matrices(info, box.target):
            last = jobs[-1] if jobs else None
            if last is not None and last.path == path and _overlap(last.parts[0][0], part):
                jobs[-1] = TurnJob(path, (*last.parts, (part, target)), entry)
            else:
                jobs.append(TurnJob(path, ((part, target),), entry))
    return jobs


def _matrices(info: TensorInfo, target: Region) -> Iterator[tuple[TensorInfo, Region]]:
    """A stack's matrices, each with its place: no more than one is read at a time."""
    if len(info.shape) < 3:
        yield info, target
        return
    first = target[0][0]
    for index in range(info.shape[0]):
        yield info.matrix(index), ((first + index, first + index + 1), *target[1:])


def _overlap(one: TensorInfo, other: TensorInfo) -> bool:
    return one.offset < other.offset + other.span_nbytes and other.offset < one.offset + one.span_nbytes


def _quantize_jobs(box: WeightBox, weight: WeightEntry, scale: WeightEntry, tensors: Tensors) -> Iterator[QuantizeJob]:
    name = box.checkpoint_name
    path, info = tensors[name]
    if info.dtype not in PLAIN_FLOATS or len(info.shape) != 2:
        raise ValueError(f"{path}: {name} is {info.dtype} {info.shape} and can't be quantised for {weight.name}")
    (first, last), columns = box.source
    *outer, row, column = (place for place, _ in box.target)
    step = max(1, BLOCK_BYTES * info.shape[0] // max(1, info.nbytes))
    if info.strides is not None:  # all rows lie in all of it
        step = max(1, last - first)
    for start in range(first, last, step):
        yield QuantizeJob(
            path=path,
            info=info,
            rows=(start, min(start + step, last)),
            columns=columns,
            weight=weight,
            scale=scale,
            target_start=(*outer, row + start - first, column),
        )
