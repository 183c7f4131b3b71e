"""Owns the description of what is in a weight arena: pure data, readable and comparable without torch."""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import msgspec

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.utils.outside_json import Natural
from ramet.srt.weights.version import DEFAULT_VERSION, check_version

ENTRY_ALIGNMENT = 256  # bytes; enough for every CPU vector width and for CUDA's coalesced loads
ROLES = ("target", "draft")
LORA_ROLE = "lora:"  # and the name of an adapter
MAX_ROLE_LEN = 300

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


class WeightBox(msgspec.Struct, frozen=True, array_like=True):
    """Which slice of which checkpoint tensor fills which slice of an arena tensor.

    `source` and `target` hold one (start, stop) pair per dimension of the checkpoint tensor and of
    the arena tensor. With dimensions of extent 1 dropped, both sides have the same shape.
    """

    checkpoint_name: str
    source: tuple[tuple[Natural, Natural], ...]
    target: tuple[tuple[Natural, Natural], ...]


class WeightEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor in the arena. What no box covers is padding and holds zeros."""

    name: str
    dtype: str
    shape: tuple[Natural, ...]
    offset: Natural
    nbytes: Natural
    boxes: tuple[WeightBox, ...]
    aliases: tuple[str, ...] = ()


class WeightChecksums(msgspec.Struct, frozen=True, kw_only=True):
    """Content checksums of an arena, one hex string per entry of its manifest, in the same order."""

    algorithm: str
    values: tuple[str, ...]  # over all bytes of the entry
    samples: tuple[str, ...]  # over three blocks of it: cheap to compare for memory that is shared, not copied


class WeightManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank's arena holds, and of which model it is a part."""

    model_name: str
    revision: str
    dtype: str
    quantization: str
    role: str
    parallel: ParallelConfig
    arena_nbytes: Natural
    entries: tuple[WeightEntry, ...]
    dimensions: dict[str, int] = {}  # sizes of the whole model, by their names in its config
    checksums: WeightChecksums | None = None  # once the weights are final
    is_tied: bool | None = None  # whether the output head is the embedding's table; None from versions that don't say
    weight_version: str = DEFAULT_VERSION  # a name for what the tensors hold

    @property
    def payload_nbytes(self) -> int:
        """Bytes of all tensors, without the gaps that align them."""
        return sum(entry.nbytes for entry in self.entries)


def build_weight_manifest(
    named_parameters: Iterable[tuple[str, Any]],
    *,
    model_name: str,
    revision: str,
    dtype: str,
    quantization: str,
    role: str,
    parallel: ParallelConfig,
    dimensions: dict[str, int] | None = None,
    is_tied: bool | None = None,
    weight_version: str = DEFAULT_VERSION,
) -> WeightManifest:
    """Lay the parameters out in an arena, in their order, each at an aligned offset.

    A parameter needs `.shape`, `.dtype` and `.boxes`; the same object under several names becomes one
    entry with aliases.

    Raises:
        ValueError: if a parameter has no boxes, an unknown dtype, or boxes that don't fit its shape.
    """
    check_role(role)
    first_names: dict[int, str] = {}
    parameters: dict[str, Any] = {}
    aliases: dict[str, list[str]] = {}
    for name, parameter in named_parameters:
        first = first_names.setdefault(id(parameter), name)
        if first == name:
            parameters[name] = parameter
            aliases[name] = []
        else:
            aliases[first].append(name)
    entries = []
    offset = 0
    for name, parameter in parameters.items():
        entry = _build_entry(name, parameter, offset, tuple(aliases[name]))
        entries.append(entry)
        offset = align_up(offset + entry.nbytes, ENTRY_ALIGNMENT)
    return WeightManifest(
        model_name=model_name,
        revision=revision,
        dtype=dtype,
        quantization=quantization,
        role=role,
        parallel=parallel,
        arena_nbytes=offset,
        entries=tuple(entries),
        dimensions=dimensions or {},
        is_tied=is_tied,
        weight_version=weight_version,
    )


def check_role(role: str) -> str:
    """Raises ValueError unless `role` is that of a model, or of an adapter."""
    if role not in ROLES and not (role.startswith(LORA_ROLE) and len(LORA_ROLE) < len(role) <= MAX_ROLE_LEN):
        known = ", ".join((*ROLES, f"{LORA_ROLE}NAME"))
        raise ValueError(f"the model role must be one of {known}; got {role[:MAX_ROLE_LEN]!r}")
    return role


def _build_entry(name: str, parameter: Any, offset: int, aliases: tuple[str, ...]) -> WeightEntry:
    boxes = getattr(parameter, "boxes", None)
    if boxes is None:
        raise ValueError(f"parameter {name} has no boxes: its layer does not say which checkpoint tensors fill it")
    dtype = dtype_name(parameter.dtype)
    shape = tuple(int(extent) for extent in parameter.shape)
    entry = WeightEntry(
        name=name,
        dtype=dtype,
        shape=shape,
        offset=offset,
        nbytes=math.prod(shape) * element_size(dtype),
        boxes=tuple(boxes),
        aliases=aliases,
    )
    for box in entry.boxes:
        check_box(entry, box)
    return entry


def says_tied(manifest: WeightManifest) -> bool | None:
    """Whether the output head is the embedding's table, as far as a manifest tells."""
    if manifest.is_tied is not None:
        return manifest.is_tied
    has_head = any(box.checkpoint_name == "lm_head.weight" for entry in manifest.entries for box in entry.boxes)
    return False if has_head else None


def check_box(entry: WeightEntry, box: WeightBox) -> None:
    """Raise ValueError unless `box` lies inside the entry and has the same shape on both sides."""
    if len(box.target) != len(entry.shape) or any(
        not 0 <= start <= stop <= extent for (start, stop), extent in zip(box.target, entry.shape, strict=True)
    ):
        raise ValueError(f"{entry.name}: the box {box.target} does not fit the shape {entry.shape}")
    if any(not 0 <= start <= stop for start, stop in box.source) or box_shape(box.source) != box_shape(box.target):
        raise ValueError(
            f"{entry.name}: the box {box.source} of {box.checkpoint_name} does not have the shape of {box.target}"
        )


def box_shape(ranges: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Extents of a box with those of 1 dropped: equal for the two sides of a WeightBox."""
    return tuple(stop - start for start, stop in ranges if stop - start != 1)


def align_up(value: int, alignment: int) -> int:
    """The next multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


def dtype_name(dtype: Any) -> str:
    """A dtype's plain name: torch.bfloat16 and "bfloat16" both give "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def element_size(dtype: str) -> int:
    """Bytes of one element.

    Raises:
        ValueError: for a dtype that an arena cannot hold.
    """
    size = DTYPE_BYTES.get(dtype)
    if size is None:
        raise ValueError(f"unknown dtype {dtype!r}; known ones are {', '.join(DTYPE_BYTES)}")
    return size


def layout_digest(manifest: WeightManifest) -> str:
    """Hex digest of everything that decides what lies where.

    Two arenas with the same digest hold the same slices of the same checkpoint tensors at the same
    offsets, so that one is a byte-for-byte copy of the other once both are filled from one checkpoint.
    """
    layout = [(e.name, e.dtype, e.shape, e.offset, e.nbytes, e.boxes) for e in manifest.entries]
    return hashlib.sha256(msgspec.msgpack.encode((manifest.arena_nbytes, layout))).hexdigest()[:32]


def check_manifest(manifest: WeightManifest) -> WeightManifest:
    """Return a manifest that came from outside once its numbers are found consistent.

    Raises:
        ValueError: if an entry lies outside the arena, overlaps another, or its size or boxes don't fit its shape.
    """
    check_version(manifest.weight_version)
    end = 0
    for entry in sorted(manifest.entries, key=lambda e: (e.offset, e.nbytes)):
        if any(extent < 0 for extent in entry.shape) or entry.nbytes != math.prod(entry.shape) * element_size(
            entry.dtype
        ):
            raise ValueError(f"{entry.name}: {entry.nbytes} bytes do not fit shape {entry.shape} of {entry.dtype}")
        if entry.offset < end or entry.offset + entry.nbytes > manifest.arena_nbytes:
            raise ValueError(f"{entry.name}: offset {entry.offset} overlaps another tensor or leaves the arena")
        for box in entry.boxes:
            check_box(entry, box)
        end = entry.offset + entry.nbytes
    checksums = manifest.checksums
    if checksums and not len(checksums.values) == len(checksums.samples) == len(manifest.entries):
        raise ValueError(f"{len(checksums.values)} checksums for {len(manifest.entries)} tensors")
    return manifest


def content_checksums(manifest: WeightManifest | None, *, samples_only: bool = False) -> dict[tuple, str]:
    """The checksums in a manifest by what they are of: (algorithm, name, …), which is equal for equal slices."""
    checksums = manifest.checksums if manifest is not None else None
    if manifest is None or checksums is None:
        return {}
    values = checksums.samples if samples_only else checksums.values
    return {
        content_key(checksums.algorithm, entry): value for entry, value in zip(manifest.entries, values, strict=True)
    }


def content_key(algorithm: str, entry: WeightEntry) -> tuple:
    """What a checksum of a tensor is of: equal for equal slices, whatever arena they lie in."""
    return algorithm, entry.name, entry.dtype, entry.shape, entry.boxes
