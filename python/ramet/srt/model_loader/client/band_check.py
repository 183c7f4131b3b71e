"""Owns the comparison of an arena's bytes with the table of a checkpoint's digest, band by band. Asks nobody."""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ramet.srt.configs.weight_format import OF_COLUMNS, TRANSPOSED
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.arena.host import HostWeightArena
from ramet.srt.model_loader.checkpoint.cache_scales import cache_scale_names, is_cache_scale
from ramet.srt.model_loader.checkpoint.checks import EXPONENTS
from ramet.srt.model_loader.checkpoint.fused_tensors import OF_A_MATRIX, fused_parts
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo
from ramet.srt.model_loader.checkpoint.stacked_experts import (
    STACKED,
    has_transposed_experts,
    is_turned_stack,
    split_stacked_experts,
)
from ramet.srt.model_loader.checkpoint.whole_model import SCALE_SUFFIXES
from ramet.srt.model_loader.checksums.tensor_digest import hash_bytes
from ramet.srt.utils.threads import num_copy_threads
from ramet.srt.weights.boxes import Region, intersect, locate_box, region_volume, share_out
from ramet.srt.weights.content_digest import DigestTable, TensorDigest, bands_of, piece
from ramet.srt.weights.manifest import WeightBox, WeightEntry, WeightManifest, element_size
from ramet.srt.weights.planner import Holding, region_offset

NARROWER = {
    "float32": ("bfloat16", "float16", *EXPONENTS)
}  # what is widened to a type without loss, so that it can be undone


@dataclass
class BandCheck:
    """What came of it, by the names of the arena's entries.

    Attributes:
        wrong: entries whose bytes are others than the table says, or whose padding is not zeros.
        unchecked: entries that could not be compared, and why.
    """

    wrong: set[str] = field(default_factory=set)
    unchecked: dict[str, str] = field(default_factory=dict)


class _Held(NamedTuple):
    """A part of a checkpoint tensor that the arena has."""

    entry: str
    holding: Holding  # in the coordinates of the table's tensor
    repeated: Holding | None = None  # of a scale of a whole matrix: all of its copies


class _Target(NamedTuple):
    """Where a tensor that boxes name lies in one of the table: all of it, a part, or part of a stack's matrix."""

    tensor: TensorDigest
    matrix: int | None = None
    first: tuple[int, ...] = ()  # where the part begins, along the last dimensions; empty: at the beginning
    is_transposed: bool = False  # the matrix has rows where the boxes have columns

    @property
    def is_repeated(self) -> bool:
        """Whether the table has one number for all that the boxes fill: the scale of a whole matrix."""
        is_scale = self.tensor.name.endswith(OF_A_MATRIX)
        return is_scale and self.matrix is None and math.prod(self.tensor.shape) == 1

    def place(self, holding: Holding) -> Holding:
        """A part of what boxes name, as a part of the table's tensor."""
        region, strides, num = holding.region, holding.strides, len(self.tensor.shape)
        if self.is_repeated:
            return Holding(((0, 1),) * num, holding.offset, (0,) * num, holding.dtype)
        if num == 1 and region[1:] == ((0, 1),):  # scales of rows, as a vector
            region, strides = region[:1], strides[:1]
        if self.is_transposed:
            region, strides = (*region[:-2], *region[:-3:-1]), (*strides[:-2], *strides[:-3:-1])
        first = self.first or (0,) * len(region)
        if len(first) == len(region):
            region = tuple((start + by, stop + by) for (start, stop), by in zip(region, first, strict=True))
        if self.matrix is not None:
            region, strides = ((self.matrix, self.matrix + 1), *region), (0, *strides)
        return Holding(region, holding.offset, strides, holding.dtype)


def check_bands(arena: WeightArena, table: DigestTable, names: Collection[str] | None = None) -> BandCheck:
    """Compare every byte of the arena's tensors: what boxes fill with the table, padding with zeros.

    Takes one pass of SHA-256 over them on the host, in as many threads as there are processors.

    Args:
        names: of the table's tensors that are compared; None: all are.
    """
    held, unchecked = find_held(arena.manifest, table)
    if names is not None:
        held = {name: parts for name, parts in held.items() if name in names}
        entries = {part.entry for parts in held.values() for part in parts}
        unchecked = {entry: reason for entry, reason in unchecked.items() if entry in entries}
    check = BandCheck(unchecked=unchecked)
    jobs = [_TensorJob(arena, table.tensors[name], parts, check) for name, parts in held.items()]
    jobs.sort(key=lambda job: -job.num_elements)
    with ThreadPoolExecutor(num_copy_threads(), thread_name_prefix="check-digest") as pool:
        list(pool.map(_TensorJob.run, jobs))
        list(pool.map(lambda entry: _check_padding(arena, entry, check), arena.manifest.entries))
    known = {settled for name in table.tensors for settled in cache_scale_names(name)}
    for entry, box in ((one, box) for one in arena.manifest.entries for box in one.boxes):
        if names is None and is_cache_scale(box.checkpoint_name) and box.checkpoint_name not in known:
            _check_absent_scale(arena, entry, box, check)
    return check


def _check_absent_scale(arena: WeightArena, entry: WeightEntry, box: WeightBox, check: BandCheck) -> None:
    """A scale of the KV cache that the checkpoint doesn't have is 1."""
    arena.make_current()
    holding = Holding(box.source, *locate_box(entry, box), entry.dtype)
    if read_part(arena, holding, box.source).tobytes() != np.float32(1).tobytes():
        check.wrong.add(entry.name)


def find_held(manifest: WeightManifest, table: DigestTable) -> tuple[dict[str, list[_Held]], dict[str, str]]:
    """What an arena has of each tensor of the table; and which entries can't be compared, and why."""
    names = {box.checkpoint_name for entry in manifest.entries for box in entry.boxes}
    targets = {**_find_fused(table, names, manifest.dimensions), **find_targets(table, names, manifest.dimensions)}
    held: dict[str, list[_Held]] = {}  # by the table's tensors: a band may lie in several entries
    unchecked = {}
    for entry, box in ((one, box) for one in manifest.entries for box in one.boxes):
        target = targets.get(box.checkpoint_name)
        reason = _why_not(entry, box, target)
        if target is None and is_cache_scale(box.checkpoint_name):
            continue  # see `_check_absent_scale`
        if reason or target is None:
            unchecked[entry.name] = reason
        elif region_volume(box.source):
            offset, strides = locate_box(entry, box)
            own = Holding(box.source, offset, strides, entry.dtype)
            repeated = own if target.is_repeated else None
            held.setdefault(target.tensor.name, []).append(_Held(entry.name, target.place(own), repeated))
    return held, unchecked


def find_targets(table: DigestTable, names: Set[str], dimensions: Mapping[str, int]) -> dict[str, _Target]:
    """The tensors that boxes name, in the table, by these names; those that the checkpoint stacks, in their stacks.

    Scales may have the other one of their two names.
    """
    found = {
        name: _Target(table.tensors[name], is_transposed=is_turned_stack(name))
        for name in names
        if name in table.tensors
    }
    for suffix, other in (SCALE_SUFFIXES, SCALE_SUFFIXES[::-1]):
        for name in names - found.keys():
            tensor = table.tensors.get(name.removesuffix(suffix) + other) if name.endswith(suffix) else None
            if tensor is not None:
                found[name] = _Target(tensor)
    for name, tensor in table.tensors.items():
        found |= {settled: _Target(tensor) for settled in cache_scale_names(name) if settled in names}
    stacks = {name: one for name, one in table.tensors.items() if name not in names and STACKED.fullmatch(name)}
    shapes = [(name, tensor.shape) for name, tensor in stacks.items()]
    try:
        are_transposed = has_transposed_experts(shapes, dimensions.get("hidden_size"))
    except ValueError:  # of a checkpoint that can't be loaded: its shapes won't fit
        are_transposed = False
    for name, tensor in stacks.items():
        size = element_size(tensor.dtype)
        info = TensorInfo(tensor.dtype, tensor.shape, 0, math.prod(tensor.shape) * size)
        for new_name, part in split_stacked_experts("", {name: info}, names, None, are_transposed).items():
            if new_name not in names or new_name in found:
                continue
            if part.shape == tensor.shape:
                found[new_name] = _Target(tensor)
                continue
            num_rows, num_columns = tensor.shape[1:]
            matrix, rest = divmod(part.offset // size, num_rows * num_columns)
            found[new_name] = _Target(tensor, matrix, divmod(rest, num_columns), are_transposed)
    return found


def _find_fused(table: DigestTable, names: Set[str], dimensions: Mapping[str, int]) -> dict[str, _Target]:
    """The tensors that boxes name and that the checkpoint holds as one, as parts of what it has."""
    found: dict[str, _Target] = {}
    heads = [dimensions.get(name, 0) for name in ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")]
    for name, tensor in table.tensors.items():
        parts = [] if name in names else fused_parts(name)
        if not names & set(parts):
            continue
        if math.prod(tensor.shape) == 1 or name.endswith(OF_COLUMNS):  # the same for all parts
            found.update({part: _Target(tensor) for part in parts})
            continue
        shares = heads if len(parts) == len(heads) else [1] * len(parts)
        dim = 1 if name.endswith(TRANSPOSED) else 0
        unit, rest = divmod(tensor.shape[dim], max(1, sum(shares)))
        if not rest:
            for part, start in zip(parts, itertools.accumulate(shares, initial=0), strict=False):
                first = [0] * len(tensor.shape)
                first[dim] = start * unit
                found[part] = _Target(tensor, None, tuple(first))
    return found


def _why_not(entry: WeightEntry, box: WeightBox, target: _Target | None) -> str:
    """Why a box's bytes can't be those of the table's tensor; "" if they can."""
    name = box.checkpoint_name
    if target is None:
        return f"the digest's checkpoint has no {name}"
    tensor = target.tensor
    if tensor.dtype not in (entry.dtype, *NARROWER.get(entry.dtype, ())):
        return f"{name} is {tensor.dtype} in the checkpoint and {entry.dtype} here"
    region = target.place(Holding(box.source, 0, (0,) * len(box.source), entry.dtype)).region
    if len(region) != len(tensor.shape) or any(b > n for (_, b), n in zip(region, tensor.shape, strict=True)):
        return f"{name} has the shape {list(tensor.shape)} in the checkpoint, which {list(region)} is no part of"
    return ""


class _TensorJob:
    """The comparison of what an arena has of one tensor of the table."""

    def __init__(self, arena: WeightArena, tensor: TensorDigest, held: Sequence[_Held], check: BandCheck) -> None:
        self._arena = arena
        self._tensor = tensor
        self._held = held
        self._check = check
        self._known: dict[tuple, bool] = {}  # bands by kind, index and where their parts lie; whether they are right
        self.num_elements = sum(region_volume(one.holding.region) for one in held)

    def run(self) -> None:
        self._arena.make_current()
        for one in self._held:
            if not (self._compare(one, "rows") or self._compare(one, "columns")):
                region, shape = list(one.holding.region), list(self._tensor.shape)
                self._check.unchecked[one.entry] = f"{region} of {self._tensor.name} {shape} is no sum of whole bands"

    def _compare(self, one: _Held, kind: str) -> bool:
        """Whether all bands under a part are in the arena; compares those that are."""
        hashes = self._tensor.rows if kind == "rows" else self._tensor.columns
        others = [other for other in self._held if other is not one]
        num_bands = 0
        for index, band in bands_under(one.holding.region, self._tensor, kind):
            num_bands += 1
            parts, missing = share_out(band, ((held, held.holding.region) for held in (one, *others)))
            if missing:
                return False
            key = (kind, index, *sorted((held.holding.offset, part) for held, part in parts))
            if key not in self._known:
                content = self._read(band, parts)
                self._known[key] = content is not None and hash_bytes(content) == piece(hashes, index)
            if not self._known[key]:
                self._check.wrong.add(one.entry)
        if one.repeated is not None and not _all_alike(read_part(self._arena, one.repeated, one.repeated.region)):
            self._check.wrong.add(one.entry)
        return num_bands > 0

    def _read(self, band: Region, parts: Sequence[tuple[_Held, Region]]) -> np.ndarray | None:
        """A band's bytes in the checkpoint's type, gathered from where its parts lie; None if they can't be those."""
        if len(parts) == 1:
            return self._read_part(*parts[0])
        size = element_size(self._tensor.dtype)
        whole = np.empty((*(stop - start for start, stop in band), size), np.uint8)
        for held, part in parts:
            place = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(part, band, strict=True))
            content = self._read_part(held, part)
            if content is None:
                return None
            whole[place] = content
        return whole

    def _read_part(self, held: _Held, part: Region) -> np.ndarray | None:
        content = read_part(self._arena, held.holding, part)
        return content if held.holding.dtype == self._tensor.dtype else narrowed(content, self._tensor.dtype)


def narrowed(content: np.ndarray, dtype: str) -> np.ndarray | None:
    """What float32 numbers were before they were widened; None if no numbers of that type widen to them.

    Args:
        content: uint8 [..., 4].
        dtype: one of NARROWER.

    Returns:
        uint8 [..., bytes of an element].
    """
    wide = np.ascontiguousarray(content).view(np.uint32)
    if dtype == "bfloat16":
        half = (wide >> 16).astype(np.uint16)
        back = half.astype(np.uint32) << 16
    elif dtype in EXPONENTS:
        half = (wide >> 23).astype(np.uint8)
        back = np.where(half == 0, 1 << 22, half.astype(np.uint32) << 23)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            half = wide.view(np.float32).astype(np.float16)
        back = half.astype(np.float32).view(np.uint32)
    return half.view(np.uint8) if np.array_equal(back, wide) else None


def _all_alike(content: np.ndarray) -> bool:
    """Whether all elements, [..., bytes of an element], are the first one."""
    elements = content.reshape(-1, content.shape[-1])
    return bool((elements == elements[0]).all())


def bands_under(region: Region, tensor: TensorDigest, kind: str) -> Iterator[tuple[int, Region]]:
    """The bands of a tensor that a region overlaps: each band's index, and the part of the tensor that it is.

    Args:
        kind: "rows" or "columns".
    """
    shape = tensor.shape
    if not shape:
        yield from [(0, ())] if kind == "rows" else []
        return
    axis = -1 if kind == "columns" or len(shape) == 1 else -2
    bands = bands_of(tensor.name, shape)[kind == "columns"]
    whole = [(0, extent) for extent in shape]
    for place in itertools.product(*(range(start, stop) for start, stop in region[:-2])):
        matrix = 0
        for index, extent in zip(place, shape, strict=False):
            matrix = matrix * extent + index
        for number, band in enumerate(bands):
            if intersect((band,), (region[axis],)) is not None:
                current = [*((index, index + 1) for index in place), *whole[len(place) :]]
                current[axis] = band
                yield matrix * len(bands) + number, tuple(current)


def read_part(arena: WeightArena, holding: Holding, region: Region) -> np.ndarray:
    """The bytes of a part of what an arena holds: uint8, [*extents of the region, bytes of an element].

    A view where the arena is in host memory.
    """
    size = element_size(holding.dtype)
    shape = (*(stop - start for start, stop in region), size)
    strides = (*holding.strides, 1)
    offset = holding.offset + region_offset(region, holding)
    if isinstance(arena, HostWeightArena):
        return np.ndarray(shape, np.uint8, arena.memory, offset, strides)
    with arena.work_context():
        memory = arena.byte_tensor()
        part = memory.as_strided(shape, strides, memory.storage_offset() + offset)
        return part.contiguous().cpu().numpy()


def _check_padding(arena: WeightArena, entry: WeightEntry, check: BandCheck) -> None:
    whole = tuple((0, extent) for extent in entry.shape)
    if not region_volume(whole):
        return
    boxes = ((None, box.target) for box in entry.boxes if region_volume(box.target))
    _, padding = share_out(whole, boxes)
    if padding:
        arena.make_current()
        offset, strides = locate_box(entry, WeightBox(entry.name, whole, whole))
        holding = Holding(whole, offset, strides, entry.dtype)
        if any(read_part(arena, holding, part).any() for part in padding):
            check.wrong.add(entry.name)
