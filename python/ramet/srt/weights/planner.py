"""Owns the planner: which bytes of which source fill which bytes of an arena. A pure function; it copies nothing."""

import bisect
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from ramet.srt.weights.boxes import (
    ByteRange,
    Region,
    box_byte_range,
    contiguous_strides,
    flatten,
    invert_ranges,
    locate_box,
    merge_ranges,
    region_volume,
    share_out,
)
from ramet.srt.weights.copy_op import CopyOp, split_op
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.manifest import WeightBox, WeightEntry, WeightManifest, element_size, layout_digest

MAX_OP_BYTES = 64 << 20
MAX_MERGED_GAP_BYTES = 1 << 20
CASTABLE_DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Holding:
    """A region of a checkpoint tensor that a source has."""

    region: Region
    offset: int  # of the region's first element, in bytes in the source
    strides: tuple[int, ...]  # bytes between neighbours along each dimension of the checkpoint tensor
    dtype: str


class PlanSource(Protocol):
    """What the planner knows of a source."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def holdings(self) -> Mapping[str, Sequence[Holding]]:
        """What it has, by the name of the checkpoint tensor."""

    @property
    def casts(self) -> bool:
        """Whether it can convert between floating-point types while it copies."""

    @property
    def layout(self) -> str:
        """Sources with the same layout, unless it is "", hold the same bytes and share the work."""

    @property
    def occupied(self) -> Sequence[ByteRange] | None:
        """Its non-zero bytes; None when a read must not leave the tensors."""


@dataclass(frozen=True)
class TensorSource:
    """A PlanSource that is known by its tensors alone."""

    name: str
    holdings: Mapping[str, Sequence[Holding]]
    casts: bool = False
    layout = ""
    occupied = None


@dataclass(frozen=True)
class ArenaSource:
    """A seed's arena as a PlanSource; offsets are those in it. What is in it is worked out when it is asked for.

    A client that has the same layout never asks.
    """

    name: str
    manifest: WeightManifest
    casts = False

    @functools.cached_property
    def holdings(self) -> Mapping[str, Sequence[Holding]]:
        return holdings_of(self.manifest)

    @functools.cached_property
    def layout(self) -> str:
        return layout_digest(self.manifest)

    @functools.cached_property
    def occupied(self) -> Sequence[ByteRange]:
        return occupied_ranges(self.manifest.entries)


class PlanError(ValueError):
    """The sources can't fill the arena: they lack tensors, or hold them in another type."""

    def __init__(self, uncovered: Sequence[str], mismatches: Sequence[str]) -> None:
        self.uncovered = tuple(uncovered)
        self.mismatches = tuple(mismatches)
        parts = []
        if mismatches:
            parts.append(f"type, size or number of dimensions differs for {name_some(mismatches)}")
        if uncovered:
            parts.append(f"no source has {name_some(uncovered)}")
        super().__init__("; ".join(parts))


@dataclass(frozen=True)
class TransferPlan:
    """Copy operations that together fill an arena, sorted by source and then by target offset."""

    ops: tuple[CopyOp, ...]
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", sum(op.nbytes for op in self.ops))

    def of_source(self, index: int) -> list[CopyOp]:
        return [op for op in self.ops if op.source == index]


def holdings_of(manifest: WeightManifest) -> dict[str, list[Holding]]:
    """What an arena has of each checkpoint tensor; offsets are those in the arena."""
    holdings: dict[str, list[Holding]] = {}
    for entry in manifest.entries:
        for box in entry.boxes:
            offset, strides = locate_box(entry, box)
            holdings.setdefault(box.checkpoint_name, []).append(Holding(box.source, offset, strides, entry.dtype))
    return holdings


def whole_tensor(shape: Sequence[int], offset: int, dtype: str, strides: tuple[int, ...] | None = None) -> Holding:
    """A checkpoint tensor that lies at a byte offset of a source; row-major without `strides`."""
    strides = strides or contiguous_strides(shape, element_size(dtype))
    return Holding(tuple((0, extent) for extent in shape), offset, strides, dtype)


def occupied_ranges(entries: Iterable[WeightEntry]) -> list[ByteRange]:
    """The arena bytes that boxes fill; what is in between is alignment or padding, and holds zeros."""
    # A box of several ranges counts as its whole tensor: nothing is merged across that.
    return merge_ranges(
        [
            box_byte_range(entry, box) or (entry.offset, entry.offset + entry.nbytes)
            for entry in entries
            for box in entry.boxes
        ]
    )


def zero_ranges(manifest: WeightManifest) -> Iterator[ByteRange]:
    """The arena bytes that must be cleared before a plan is executed, because it may not write them.

    Computed when they are asked for: a fresh arena is all zeros.
    """
    filled = []
    for entry in manifest.entries:
        ranges = [box_byte_range(entry, box) for box in entry.boxes]
        volume = sum(region_volume(box.target) for box in entry.boxes)
        if volume * element_size(entry.dtype) == entry.nbytes:
            filled.append((entry.offset, entry.offset + entry.nbytes))
        elif None not in ranges:
            filled.extend(r for r in ranges if r is not None)
    yield from invert_ranges(merge_ranges(filled), manifest.arena_nbytes)


def plan(
    target: WeightManifest,
    sources: Sequence[PlanSource],
    *,
    max_op_nbytes: int = MAX_OP_BYTES,
    unfinished: Iterable[CopyOp] | None = None,
) -> TransferPlan:
    """Copy operations that fill the target's boxes: from sources laid out as it is if there are any, else earlier ones.

    Sources of the same layout share the work evenly. Neighbouring ranges are merged, across gaps of
    zeros too, then cut so that none writes more than `max_op_nbytes` (a single row is never cut in two
    when there are several).

    Args:
        unfinished: operations of an earlier plan for this target: only what they would have written is
            planned again. A strided operation that touches it is taken whole.

    Raises:
        PlanError: if no source has a part of a tensor, or only in a type that it can't convert.
    """
    groups = _group_equal_sources(sources)
    wanted = None if unfinished is None else merge_ranges([(op.target_offset, op.target_stop) for op in unfinished])
    twins = _find_twins(target, groups)
    merged = _plan_boxes(target, groups) if twins is None else [(twins, _whole_arena(target, twins))]
    ops: list[CopyOp] = []
    for group, group_ops in merged:
        chosen = group_ops if wanted is None else [part for op in group_ops for part in _clip(op, wanted)]
        ops.extend(_share([part for op in chosen for part in split_op(op, max_op_nbytes)], group.members))
    return TransferPlan(tuple(sorted(ops, key=lambda op: (op.source, op.target_offset))))


@dataclass(frozen=True)
class _Group:
    """Sources that hold the same bytes: what is planned with the first one suits each of them."""

    first: PlanSource
    members: list[int]  # indices of the sources

    @property
    def index(self) -> int:
        return self.members[0]


def _group_equal_sources(sources: Sequence[PlanSource]) -> list[_Group]:
    groups: dict[object, _Group] = {}
    for index, source in enumerate(sources):
        groups.setdefault(source.layout or index, _Group(source, [])).members.append(index)
    return list(groups.values())


def _find_twins(target: WeightManifest, groups: Sequence[_Group]) -> _Group | None:
    """The sources that are laid out as the target, if there are any."""
    layout = layout_digest(target)
    return next((group for group in groups if group.first.layout == layout), None)


def _whole_arena(target: WeightManifest, twins: _Group) -> list[CopyOp]:
    """All tensors, and the zeros between them, in one range."""
    stop = max((entry.offset + entry.nbytes for entry in target.entries), default=0)
    return [CopyOp(source=twins.index, source_offset=0, target_offset=0, row_nbytes=stop)] if stop else []


def _plan_boxes(target: WeightManifest, groups: Sequence[_Group]) -> list[tuple[_Group, list[CopyOp]]]:
    """Each group of equal sources, and what to take from one of them."""
    boxes = _BoxPlan(groups)
    for entry in target.entries:
        for box in entry.boxes:
            boxes.add(entry, box)
    if boxes.uncovered or boxes.mismatches:
        raise PlanError(boxes.uncovered, boxes.mismatches)
    occupied = occupied_ranges(target.entries)
    return [
        (group, _merge(group_ops, group.first.occupied, occupied))
        for group, group_ops in zip(groups, boxes.ops, strict=True)
    ]


class _BoxPlan:
    """What each group of equal sources gives, box by box, and what none can give."""

    def __init__(self, groups: Sequence[_Group]) -> None:
        self._groups = groups
        self.ops: list[list[CopyOp]] = [[] for _ in groups]
        self.uncovered: list[str] = []
        self.mismatches: list[str] = []

    def add(self, entry: WeightEntry, box: WeightBox) -> None:
        """Plan one box of one tensor."""
        if region_volume(box.source) == 0:
            return
        unusable: list[str] = []
        parts, missing = share_out(box.source, self._offers(entry, box, unusable))
        target = Holding(box.source, *locate_box(entry, box), entry.dtype)
        for (number, holding), region in parts:
            self.ops[number].extend(_copy_region(region, holding, target, self._groups[number].index))
        if missing and unusable:
            self.mismatches.append(unusable[-1])
        elif missing:
            self.uncovered.append(f"{entry.name} ({box.checkpoint_name}{_format_region(missing[0])})")

    def _offers(
        self, entry: WeightEntry, box: WeightBox, unusable: list[str]
    ) -> Iterator[tuple[tuple[int, Holding], Region]]:
        """What the groups, by their numbers, hold of a box's tensor; what can't be used of it goes to `unusable`."""
        for number, group in enumerate(self._groups):
            for holding in group.first.holdings.get(box.checkpoint_name, ()):
                difference = _find_difference(group.first, holding, entry, box)
                if difference is None:
                    yield (number, holding), holding.region
                else:
                    unusable.append(f"{entry.name} ({difference})")


def _find_difference(source: PlanSource, holding: Holding, entry: WeightEntry, box: WeightBox) -> str | None:
    """Why a holding can't fill a box of its tensor; None if it can."""
    if len(holding.region) != len(box.source):
        return f"{len(holding.region)} dimensions in {source.name}"
    if holding.dtype != entry.dtype and not (source.casts and _can_cast(holding.dtype, entry.dtype)):
        return f"{holding.dtype} in {source.name}, {entry.dtype} here"
    return None


def _can_cast(source: str, target: str) -> bool:
    return source in CASTABLE_DTYPES and target in CASTABLE_DTYPES


def _copy_region(region: Region, source: Holding, target: Holding, index: int) -> Iterator[CopyOp]:
    sizes = element_size(source.dtype), element_size(target.dtype)
    casts = source.dtype != target.dtype
    row, (num_rows, source_stride, target_stride), repeats = flatten(
        [stop - start for start, stop in region], source.strides, target.strides, sizes
    )
    source_start = source.offset + region_offset(region, source)
    target_start = target.offset + region_offset(region, target)
    for source_offset, target_offset in repeats:
        yield CopyOp(
            source=index,
            source_offset=source_start + source_offset,
            target_offset=target_start + target_offset,
            row_nbytes=row * sizes[1],
            num_rows=num_rows,
            source_stride=source_stride,
            target_stride=target_stride,
            source_dtype=source.dtype if casts else "",
            target_dtype=target.dtype if casts else "",
        )


def region_offset(region: Region, holding: Holding) -> int:
    """Bytes from a holding's first element to the first one of a region inside of it."""
    return sum(
        (start - held) * stride
        for (start, _), (held, _), stride in zip(region, holding.region, holding.strides, strict=True)
    )


def _clip(op: CopyOp, wanted: Sequence[ByteRange]) -> Iterator[CopyOp]:
    """The parts of an operation that write wanted bytes."""
    first = bisect.bisect_right(wanted, op.target_offset, key=lambda r: r[1])
    for start, stop in wanted[first:]:
        if start >= op.target_stop:
            return
        if not op.is_contiguous:
            yield op
            return
        start, stop = max(start, op.target_offset), min(stop, op.target_stop)
        yield msgspec.structs.replace(
            op,
            source_offset=op.source_offset + start - op.target_offset,
            target_offset=start,
            row_nbytes=stop - start,
        )


def _merge(
    ops: Sequence[CopyOp], source_occupied: Sequence[ByteRange] | None, target_occupied: Sequence[ByteRange]
) -> list[CopyOp]:
    """Join contiguous operations that follow each other on both sides, or have only zeros in between."""
    merged: list[CopyOp] = []
    for op in sorted(ops, key=lambda op: op.target_offset):
        last = merged[-1] if merged else None
        if last is None or not (last.is_contiguous and op.is_contiguous):
            merged.append(op)
            continue
        gap = op.target_offset - last.target_stop
        source_stop = last.source_offset + last.row_nbytes
        follows = 0 <= gap <= MAX_MERGED_GAP_BYTES and op.source_offset - source_stop == gap
        if follows and (
            gap == 0
            or source_occupied is not None
            and _is_free(source_occupied, source_stop, op.source_offset)
            and _is_free(target_occupied, last.target_stop, op.target_offset)
        ):
            merged[-1] = msgspec.structs.replace(last, row_nbytes=op.target_stop - last.target_offset)
        else:
            merged.append(op)
    return merged


def _is_free(occupied: Sequence[ByteRange], start: int, stop: int) -> bool:
    following = bisect.bisect_right(occupied, start, key=lambda r: r[1])
    return following == len(occupied) or occupied[following][0] >= stop


def _share(ops: Sequence[CopyOp], members: Sequence[int]) -> Iterator[CopyOp]:
    """Give each of several equal sources a run of neighbouring operations of about the same bytes."""
    if len(members) == 1:
        yield from ops
        return
    total = sum(op.nbytes for op in ops)
    done = 0
    for op in ops:
        middle = done + op.nbytes // 2
        yield msgspec.structs.replace(op, source=members[min(len(members) - 1, middle * len(members) // total)])
        done += op.nbytes


def _format_region(region: Region) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in region) + "]"
