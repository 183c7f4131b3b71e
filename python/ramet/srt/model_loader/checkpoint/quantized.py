"""Owns which weights of a checkpoint have to be quantised, or quantised anew, while they are loaded. Reads nothing.

An arena's fp8 entry `X.weight`, one matrix or a stack of them, has a sibling `X.weight_scale` with one scale for each
row. A checkpoint that holds both in that form (compressed-tensors' channel strategy) is copied as it is. Otherwise
whole rows are read, brought to float32 with whatever scales the checkpoint has (none, one for the tensor, or one for
each block of it), and quantised by row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo
from ramet.srt.weights.manifest import WeightBox, WeightEntry, WeightManifest

FP8 = "float8_e4m3fn"
FLOATS = ("float32", "bfloat16", "float16", FP8)
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class QuantizeJob:
    """Some whole rows of a checkpoint matrix, to be quantised into a slice of an arena's entry."""

    path: str
    info: TensorInfo  # [num_rows, num_columns]
    rows: tuple[int, int]
    columns: tuple[int, int]  # those that this rank keeps
    weight: WeightEntry
    scale: WeightEntry
    target_start: tuple[int, ...]  # [..., row, column]
    source_scale: tuple[str, TensorInfo] | None  # file and place of the checkpoint's own scales


def split_manifest(
    manifest: WeightManifest, tensors: Mapping[str, tuple[str, TensorInfo]]
) -> tuple[WeightManifest, list[QuantizeJob], set[str]]:
    """What of a manifest is copied, and what is quantised.

    Args:
        tensors: of the checkpoint, name -> (file, where in it).

    Returns:
        The manifest without the entries that are quantised, the jobs for those, and the names of the checkpoint
        tensors that the jobs use.

    Raises:
        ValueError: if a tensor is missing or has a shape or type that can't be quantised.
    """
    entries = {entry.name: entry for entry in manifest.entries}
    jobs: list[QuantizeJob] = []
    used: set[str] = set()
    done: set[str] = set()
    for entry in manifest.entries:
        scale = entries.get(f"{entry.name}_scale")
        if entry.dtype != FP8 or scale is None or all(_is_ready(box, tensors) for box in entry.boxes):
            continue
        done |= {entry.name, scale.name}
        for box in entry.boxes:
            jobs.extend(_jobs_of_box(box, entry, scale, tensors, used))
    rest = tuple(entry for entry in manifest.entries if entry.name not in done)
    return msgspec.structs.replace(manifest, entries=rest), jobs, used


def _is_ready(box: WeightBox, tensors: Mapping[str, tuple[str, TensorInfo]]) -> bool:
    """Whether the checkpoint has the matrix in fp8 with a scale for each row."""
    weight, scale = tensors.get(box.checkpoint_name), tensors.get(f"{box.checkpoint_name}_scale")
    if weight is None or scale is None or weight[1].dtype != FP8:
        return False
    return scale[1].shape == (weight[1].shape[0], 1)


def _jobs_of_box(
    box: WeightBox,
    weight: WeightEntry,
    scale: WeightEntry,
    tensors: Mapping[str, tuple[str, TensorInfo]],
    used: set[str],
) -> Iterator[QuantizeJob]:
    name = box.checkpoint_name
    if name not in tensors:
        raise ValueError(f"the checkpoint lacks {name} (for {weight.name})")
    path, info = tensors[name]
    if (
        info.dtype not in FLOATS
        or len(info.shape) != 2
        or any(s[1] > n for s, n in zip(box.source, info.shape, strict=True))
    ):
        raise ValueError(f"{path}: {name} is {info.dtype} {info.shape} and can't be quantised for {weight.name}")
    scale_name = next((n for n in (f"{name}_scale", f"{name}_scale_inv") if n in tensors), None)
    if info.dtype == FP8 and scale_name is None:
        raise ValueError(f"{path}: {name} is {FP8}, but there are no scales for it")
    source_scale = tensors[scale_name] if scale_name is not None and info.dtype == FP8 else None
    used |= {name, *([scale_name] if scale_name is not None else [])}
    (first, last), columns = box.source
    *outer, row, column = (place for place, _ in box.target)
    step = max(1, BLOCK_BYTES * info.shape[0] // max(1, info.nbytes))
    for start in range(first, last, step):
        yield QuantizeJob(
            path=path,
            info=info,
            rows=(start, min(start + step, last)),
            columns=columns,
            weight=weight,
            scale=scale,
            target_start=(*outer, row + start - first, column),
            source_scale=source_scale,
        )
