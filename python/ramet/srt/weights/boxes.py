"""Owns slices of tensors: cutting n-dimensional boxes and flattening them to byte ranges. Pure functions."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import msgspec

from ramet.srt.weights.manifest import WeightBox, WeightEntry, element_size

Owner = TypeVar("Owner")
Region = tuple[tuple[int, int], ...]  # one (start, stop) per dimension
ByteRange = tuple[int, int]  # (start, stop)


class WeightRegion(msgspec.Struct, frozen=True, array_like=True):
    """A slice of a checkpoint tensor."""

    checkpoint_name: str
    region: Region


def region_volume(region: Region) -> int:
    """Number of elements."""
    return math.prod(stop - start for start, stop in region)


def intersect(a: Region, b: Region) -> Region | None:
    """The common part of two regions of equal rank; None when it is empty."""
    common = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    return None if any(start >= stop for start, stop in common) else common


def subtract(region: Region, hole: Region) -> list[Region]:
    """What is left of `region` without `hole`, as disjoint regions; `hole` must lie inside."""
    rest: list[Region] = []
    current = list(region)
    for d, ((start, stop), (hole_start, hole_stop)) in enumerate(zip(region, hole, strict=True)):
        pieces = [piece for piece in ((start, hole_start), (hole_stop, stop)) if piece[0] < piece[1]]
        rest.extend((*current[:d], piece, *current[d + 1 :]) for piece in pieces)
        current[d] = (hole_start, hole_stop)
    return rest


def share_out(
    region: Region, offers: Iterable[tuple[Owner, Region]]
) -> tuple[list[tuple[Owner, Region]], list[Region]]:
    """Cut a region by what each of several owners has of it; what two of them have goes to the earlier one.

    Args:
        offers: owners and regions of theirs; no more of them are asked for than it takes.

    Returns:
        Disjoint parts with their owners, in the order of the offers; and the parts that nobody has.
    """
    parts: list[tuple[Owner, Region]] = []
    missing = [region]
    for owner, offered in offers:
        rest: list[Region] = []
        for piece in missing:
            common = intersect(piece, offered)
            if common is None:
                rest.append(piece)
            else:
                parts.append((owner, common))
                rest.extend(subtract(piece, common))
        missing = rest
        if not missing:
            break
    return parts, missing


def contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Bytes between neighbours along each dimension of a row-major tensor."""
    strides = [itemsize] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    return tuple(strides)


def locate_box(entry: WeightEntry, box: WeightBox) -> tuple[int, tuple[int, ...]]:
    """Where a box of an arena tensor lies, in the coordinates of its checkpoint tensor.

    Returns:
        The byte offset of its first element in the arena, and the bytes between neighbours in the arena
        along each dimension of the checkpoint tensor (0 along those of extent 1).
    """
    strides = contiguous_strides(entry.shape, element_size(entry.dtype))
    offset, has_unit = entry.offset, len(box.source) != len(box.target)
    for (start, stop), stride in zip(box.target, strides, strict=True):
        offset += start * stride
        has_unit |= stop - start == 1
    if not has_unit:
        return offset, strides
    extended = iter(stride for (start, stop), stride in zip(box.target, strides, strict=True) if stop - start != 1)
    return offset, tuple(next(extended) if stop - start != 1 else 0 for start, stop in box.source)


def box_byte_range(entry: WeightEntry, box: WeightBox) -> ByteRange | None:
    """The arena bytes that a box fills when they are one range; None when they are several."""
    shape, target = entry.shape, box.target
    first = 0
    while first < len(shape) and target[first][1] - target[first][0] == 1:
        first += 1
    if any(target[d] != (0, shape[d]) for d in range(first + 1, len(shape))):
        return None
    stride = element_size(entry.dtype)
    start, nbytes = entry.offset, stride
    for (begin, end), extent in zip(reversed(target), reversed(shape), strict=True):
        start += begin * stride
        nbytes *= end - begin
        stride *= extent
    return start, start + nbytes


def flatten(
    extents: Sequence[int], source_strides: Sequence[int], target_strides: Sequence[int], sizes: tuple[int, int]
) -> tuple[int, tuple[int, int, int], list[tuple[int, int]]]:
    """An n-dimensional copy as repeated two-dimensional ones.

    Args:
        extents: elements along each dimension.
        sizes: bytes of an element in the source and in the target.

    Returns:
        Elements in a row that is contiguous on both sides; (rows, source stride, target stride) of the
        rows; and the (source, target) byte offsets at which that two-dimensional copy repeats.
    """
    dims: list[list[int]] = []  # [extent, source stride, target stride], outermost first
    for extent, source, target in zip(extents, source_strides, target_strides, strict=True):
        if extent == 1:
            continue
        if dims and dims[-1][1] == extent * source and dims[-1][2] == extent * target:
            dims[-1] = [dims[-1][0] * extent, source, target]
        else:
            dims.append([extent, source, target])
    row = dims.pop()[0] if dims and (dims[-1][1], dims[-1][2]) == sizes else 1
    num_rows, source_stride, target_stride = dims.pop() if dims else (1, 0, 0)
    repeats = [(0, 0)]
    for extent, source, target in dims:
        repeats = [(s + i * source, t + i * target) for s, t in repeats for i in range(extent)]
    return row, (num_rows, source_stride, target_stride), repeats


def merge_ranges(ranges: Sequence[ByteRange]) -> list[ByteRange]:
    """The same bytes as sorted ranges that neither touch nor overlap."""
    merged: list[ByteRange] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def invert_ranges(ranges: Sequence[ByteRange], end: int) -> Iterator[ByteRange]:
    """What sorted disjoint ranges leave free between 0 and `end`."""
    position = 0
    for start, stop in ranges:
        if position < start:
            yield position, start
        position = max(position, stop)
    if position < end:
        yield position, end
