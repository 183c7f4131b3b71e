"""Owns a stage that whole tensors of a checkpoint are put into one by one, and what must be true of it in the end.

What does not come stays as it is in the arena that serves. Everything that is decided here is decided by the whole
model, so that all ranks decide the same, each for its part.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ramet.srt.layers.quantization.dequantize import powers_of_two
from ramet.srt.layers.quantization.fp8 import quantize_rows
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.arena.host_hash import hash_content
from ramet.srt.model_loader.checkpoint.bare_decoder import whole_name
from ramet.srt.model_loader.checkpoint.cache_scale_check import check_cache_scales
from ramet.srt.model_loader.checkpoint.cache_scales import is_cache_scale
from ramet.srt.model_loader.checkpoint.checks import EXPONENTS, check_some
from ramet.srt.model_loader.checkpoint.idle_tensors import check_idle, may_be_idle
from ramet.srt.model_loader.checkpoint.quantized import BLOCK_BYTES
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo
from ramet.srt.model_loader.checkpoint.source import settle_names
from ramet.srt.model_loader.checkpoint.stacked_experts import STACKED, has_transposed_experts
from ramet.srt.model_loader.checkpoint.whole_model import EMBEDDING, HEAD, WholeModel, grids_of
from ramet.srt.model_loader.checksums.entries import compute_checksums
from ramet.srt.model_loader.checksums.regions import hash_region
from ramet.srt.weights.boxes import Region, contiguous_strides, region_volume
from ramet.srt.weights.delta import BITS
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.manifest import WeightBox, WeightEntry, WeightManifest, dtype_name, element_size
from ramet.srt.weights.planner import CASTABLE_DTYPES, Holding, zero_ranges

SENT = "what was sent"  # in the place of a file, in messages

Piece = tuple[WeightEntry, Region, torch.Tensor]  # what a region of an entry is to hold
Written = tuple[WeightEntry, Region, str]  # a region, and the checksum of what was put there


@dataclass(frozen=True)
class RankPart:
    """A tensor as the rank holds it, under the name that it has there."""

    tensor: torch.Tensor


@dataclass(frozen=True)
class ElementChange:
    """Some elements of a tensor that change, on top of what serves."""

    dtype: str
    shape: tuple[int, ...]
    indices: torch.Tensor  # int64 [n], rising, of the row-major order
    values: torch.Tensor  # [n], of `dtype`, or integers of the same size
    is_xor: bool  # whether their bits are combined with what is there, rather than take its place


class TensorStage:
    """Content of a rank that is made of what serves and of tensors that come.

    Args:
        serving: what serves; it does not change before the stage is sealed or dropped.
        manifest: of the stage.
        whole: the model that all ranks hold together.
        is_known: whether somebody else makes sure that what comes belongs together.

    Raises:
        MemoryError: if there is no room for it.
    """

    def __init__(
        self,
        serving: WeightArena,
        manifest: WeightManifest,
        whole: WholeModel,
        *,
        is_known: bool = False,
    ):
        self.is_known = is_known
        self.arena = serving.open_stage(manifest)
        self.arena.prepare_fill(zero_ranges(manifest))
        self.arena.populate()  # a copy that meets new pages takes several times as long
        self.num_bytes = 0  # that have come
        self.sources: set[str] = set()  # from where, by the names that load reports have
        self._serving = serving
        self._whole = whole
        self._device = self.arena.byte_tensor().device
        self._received: set[str] = set()  # names of checkpoint tensors, as boxes have them
        self._written: list[Written] = []
        self._stacks: dict[str, tuple[int, ...]] = {}  # shapes of all experts' matrices in one tensor that have come
        self._are_transposed = False  # those matrices
        self._came: dict[str, str] = {}  # checksums of whole tensors, by how they came
        self._tied: dict[str, tuple[torch.dtype, torch.Size, str]] = {}  # what has come of head and embedding
        self._boxes: dict[str, list[tuple[WeightEntry, WeightBox]]] = {}
        for entry in manifest.entries:
            for box in entry.boxes:
                self._boxes.setdefault(box.checkpoint_name, []).append((entry, box))
        self._modules: dict[str, set[str]] = {}  # of each quantised matrix, the names of its values, scales and so on
        for name in whole.quantised | whole.grids:
            self._modules.setdefault(_module(name), set()).add(name)
        entries = {entry.name: entry for entry in manifest.entries}
        self._scales = {name: entries[grids[0]] for name, grids in grids_of(entries).items()}

    def put(self, name: str, tensor: torch.Tensor | RankPart | ElementChange) -> None:
        """Put this rank's part of a tensor in its place. The tensor is not needed any more afterwards.

        Args:
            name: as checkpoints of the model have it, in any of the spellings that are read from files; of a RankPart,
                as the rank has it.
            tensor: all of it, on the host or the arena's device, of a type that a file might have; its bytes are there
                already, whatever stream they came by.

        Raises:
            ValueError: if the model has no place for it, or for one of its shape or type, or it has come before.
        """
        if isinstance(tensor, RankPart):
            self._put_part(name, tensor.tensor.detach())
            return
        if isinstance(tensor, ElementChange):
            self._change(whole_name(name), tensor)
            return
        name, dtype = whole_name(name), dtype_name(tensor.dtype)
        if tensor.layout is not torch.strided or tensor.device.type not in ("cpu", self._device.type):
            raise ValueError(f"{SENT}: {name} is a {tensor.layout} tensor on {tensor.device}")
        nbytes = tensor.numel() * element_size(dtype)
        whole = {name: TensorInfo(dtype, tuple(tensor.shape), 0, nbytes)}
        with self.arena.work_context():
            if tensor.device.type == self._device.type:
                tensor = tensor.to(self._device)  # from another GPU: the stream that is current here waits for it
            content = tensor.detach().contiguous().view(-1).view(torch.uint8)
            parts = self._settle(whole)
            for part in [part for part in parts if may_be_idle(part, self._whole)]:
                info = parts.pop(part)
                check_idle(SENT, part, info, _part_of(content, info).cpu().numpy().tobytes(), self._whole)
            check_some({part: (SENT, info) for part, info in parts.items()}, self._whole)
            self._came[f"{name} {dtype} {list(tensor.shape)}"] = self._hash(content)
            for part, info in parts.items():
                self._place(part, _part_of(content, info))
            self.arena.synchronize()
        self.num_bytes += nbytes

    def _put_part(self, name: str, tensor: torch.Tensor) -> None:
        entry = next((one for one in self.arena.manifest.entries if name in (one.name, *one.aliases)), None)
        if entry is None:
            raise ValueError(f"{SENT}: this rank has no tensor {name}")
        dtype = dtype_name(tensor.dtype)
        can_cast = {dtype, entry.dtype} <= set(CASTABLE_DTYPES)
        if tuple(tensor.shape) != entry.shape or dtype != entry.dtype and not can_cast:
            raise ValueError(
                f"{SENT}: {name} is {dtype} of the shape {tuple(tensor.shape)}, this rank has it as {entry.dtype} of "
                f"the shape {entry.shape}"
            )
        if come := {box.checkpoint_name for box in entry.boxes} & self._received:
            raise ValueError(f"{SENT}: {name_some(sorted(come))} of {name} has come before")
        with self.arena.work_context():
            for box in entry.boxes:
                self._write(entry, box.target, tensor[_slices(box.target)])
                self._received.add(box.checkpoint_name)
            self.arena.synchronize()
        self._came[f"{entry.name} as ranks hold it"] = ""  # other bytes on each
        self.num_bytes += tensor.nbytes

    def _change(self, name: str, change: ElementChange) -> None:
        size, indices = element_size(change.dtype), change.indices
        count = math.prod(change.shape)
        if len(indices) and not (indices[0] >= 0 and indices[-1] < count and bool((indices.diff() > 0).all())):
            raise ValueError(f"{SENT}: the places of the changed elements of {name} don't rise from 0 to {count}")
        parts = self._settle({name: TensorInfo(change.dtype, change.shape, 0, count * size)})
        check_some({part: (SENT, info) for part, info in parts.items()}, self._whole)
        with self.arena.work_context():
            for part, info in parts.items():
                first, stop = info.offset // size, (info.offset + info.span_nbytes) // size
                span = slice(*torch.searchsorted(indices, torch.tensor([first, stop])).tolist())
                inside, places = _places_of(info, indices[span] - first)
                self._change_part(part, info, places, change, change.values[span][inside])
            self.arena.synchronize()
        self.num_bytes += (indices.element_size() + size) * len(indices)

    def _change_part(
        self, name: str, info: TensorInfo, indices: torch.Tensor, change: ElementChange, values: torch.Tensor
    ) -> None:
        if name in self._received:
            raise ValueError(f"{SENT}: {name} has come before")
        for entry, box in self._boxes.get(name, ()):
            if entry.dtype != info.dtype or math.prod(info.shape) < region_volume(box.source):
                raise ValueError(
                    f"{SENT}: elements of {name} as {info.dtype}, which is {entry.dtype} here: send all of the tensor"
                )
            content = self._serving.tensor(entry)[_slices(box.target)].clone(memory_format=torch.contiguous_format)
            inside, places = _places_in(box.source, info.shape, indices)
            integers = getattr(torch, BITS[content.element_size()])  # which all devices can index
            bits, places = content.view(-1).view(integers), places.to(self._device)
            chosen = values[inside].view(integers).to(self._device)
            bits[places] = bits[places] ^ chosen if change.is_xor else chosen
            self._write(entry, box.target, content)
        self._received.add(name)

    @property
    def received_digest(self) -> str:
        """The same on all ranks if the same whole tensors have come to them, and their own by the same names."""
        return hashlib.sha256(repr(sorted(self._came.items())).encode()).hexdigest()

    @property
    def lacking(self) -> list[str]:
        """Names of what has not come, sorted."""
        lost = self._boxes.keys() - self._received
        if not self._serving.is_put_away:  # scales of a cache stay, or are 1; those that are away may have been others
            lost = {name for name in lost if not is_cache_scale(name)}
        return sorted(lost)

    def seal(self) -> None:
        """Take over what has not come, and make sure of all that stands here; the arena has its checksums then.

        Raises:
            ValueError: if what has come makes no whole with the rest, or is not what stands here.
        """
        if not self.is_known:
            self._check_modules()
            self._check_head()
            self._check_stacks()
        if (lost := self.lacking) and (self._serving.is_made_up or self._serving.is_put_away):
            raise ValueError(f"nothing serves that could stay, and {name_some(lost)} did not come")
        with self.arena.work_context():
            for name in self._boxes.keys() - self._received:
                for entry, box in self._boxes[name]:
                    kept = self._serving.tensor(entry)[_slices(box.target)]
                    if self._serving.is_made_up:
                        kept = torch.ones_like(kept)  # of the KV cache's scales: see above
                    self._write(entry, box.target, kept)
            self.arena.synchronize()
        check_cache_scales(self.arena, SENT)
        checksums = compute_checksums(self.arena.manifest, self.arena)
        values = dict(zip((entry.name for entry in self.arena.manifest.entries), checksums.values, strict=True))
        wrong = {entry.name for entry, region, told in self._written if told != self._held(entry, region, values)}
        if wrong:
            raise ValueError(f"what stands in memory is not what was sent, or what served: {name_some(sorted(wrong))}")
        self.arena.checksums = checksums

    def _settle(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """A tensor under the names, and in the pieces, that boxes have."""
        names = [name for name in tensors if ".experts." in name and STACKED.fullmatch(name)]
        if stacks := {name: tensors[name].shape for name in names if name not in self._whole.shapes}:
            before, self._stacks = self._stacks, self._stacks | stacks
            are_transposed = has_transposed_experts(self._stacks.items(), self._whole.hidden_size)
            if before and are_transposed != self._are_transposed:
                raise ValueError(
                    f"{SENT}: the matrices in {name_some(sorted(stacks))} are transposed, and of those in "
                    f"{name_some(sorted(before))} their shapes did not tell it: send {name_some(sorted(stacks))} first"
                )
            self._are_transposed = are_transposed
        return settle_names(SENT, tensors, self._whole, self._are_transposed)

    def _place(self, name: str, view: torch.Tensor) -> None:
        """Put a tensor that boxes name, or that the model has no use for, in its place."""
        if name in self._received:
            raise ValueError(f"{SENT}: {name} has come before")
        if name in (HEAD, EMBEDDING) and self._whole.is_tied and self._whole.has_head:
            self._tied[name] = view.dtype, view.shape, self._hash(view)
        is_made = name in self._whole.quantised and dtype_name(view.dtype) != self._whole.dtypes[name]
        for entry, box in self._boxes.get(name, ()):
            if not region_volume(box.source):
                continue
            if is_made:
                for piece in quantised_pieces(entry, self._scales[entry.name], box, view.to(self._device)):
                    self._write(*piece)
            else:
                self._write(entry, box.target, cast_values(entry, box, view))
        self._received |= self._modules[_module(name)] if is_made else {name}

    def _write(self, entry: WeightEntry, region: Region, values: torch.Tensor) -> None:
        target = self.arena.tensor(entry)[_slices(region)]
        source = values.to(self._device, target.dtype).reshape(target.shape).contiguous()
        target.copy_(source)
        self._written.append((entry, region, self.arena.hash_content(source)))

    def _hash(self, content: torch.Tensor) -> str:
        """The checksum of a contiguous tensor, where it lies."""
        return hash_content(content) if content.device.type == "cpu" else self.arena.hash_content(content)

    def _held(self, entry: WeightEntry, region: Region, values: dict[str, str]) -> str:
        """The checksum of a region as it is now; `values` are those of whole entries."""
        whole = tuple((0, extent) for extent in entry.shape)
        if region == whole:
            return values[entry.name]
        strides = contiguous_strides(entry.shape, element_size(entry.dtype))
        return hash_region(self.arena, Holding(whole, entry.offset, strides, entry.dtype), region)

    def _check_modules(self) -> None:
        """Numbers of a quantised matrix mean nothing with another one's scales."""
        for names in self._modules.values():
            come = names & self._received
            if come and come != names:
                raise ValueError(
                    f"{name_some(sorted(come))} came without {name_some(sorted(names - come))}: "
                    "a quantised matrix is changed as a whole"
                )

    def _check_head(self) -> None:
        """An output head that is the embedding's table is no other one."""
        if HEAD in self._tied and self._tied[HEAD] != self._tied.get(EMBEDDING):
            raise ValueError(f"{HEAD} came, and is not what came as {EMBEDDING}, which the model has in its place")

    def _check_stacks(self) -> None:
        """Square matrices look the same whichever way they lie; others of the model tell it."""
        stacks = {name: shape for name, shape in self._stacks.items() if name.endswith("_proj")}
        if stacks and all(len(shape) == 3 and shape[1] == shape[2] for shape in stacks.values()):
            raise ValueError(f"{name_some(sorted(stacks))}: nothing tells whether such square matrices are transposed")


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in region)


def _part_of(content: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    """A part of a tensor's bytes, as a tensor."""
    dtype: torch.dtype = getattr(torch, info.dtype)
    elements = content[info.offset : info.offset + info.span_nbytes].view(dtype)
    return elements.as_strided(info.shape, [stride // dtype.itemsize for stride in info.all_strides])


def _places_of(info: TensorInfo, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which elements belong to a part of a tensor: a mask, and where those are in the part's row-major order.

    Args:
        indices: of the tensor's row-major order, from the part's first element.
    """
    inside, places = torch.ones(len(indices), dtype=torch.bool), torch.zeros_like(indices)
    if info.strides is None:
        return inside, indices
    rest, size = indices, element_size(info.dtype)
    factors = contiguous_strides(info.shape, 1)
    by_stride = sorted(zip(info.strides, info.shape, factors, strict=True), reverse=True)
    for stride, extent, factor in by_stride:
        if extent > 1:
            place, rest = rest // (stride // size), rest % (stride // size)
            inside &= place < extent
            places += place * factor
    inside &= rest == 0
    return inside, places[inside]


def _places_in(region: Region, shape: Sequence[int], indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which places of a tensor lie in a region of it: a mask, and where those are in the region's row-major order."""
    inside, places = torch.ones(len(indices), dtype=torch.bool), torch.zeros_like(indices)
    rest, factor = indices, 1
    for (start, stop), extent in zip(reversed(region), reversed(shape), strict=True):
        place = rest % extent
        inside &= (place >= start) & (place < stop)
        places += (place - start) * factor
        rest, factor = rest // extent, factor * (stop - start)
    return inside, places[inside]


def cast_values(entry: WeightEntry, box: WeightBox, view: torch.Tensor) -> torch.Tensor:
    """What a box takes of a tensor that is not quantised here; it may yet have to be cast."""
    if entry.dtype == "float32" and dtype_name(view.dtype) in EXPONENTS:  # scales that are powers of two
        view = powers_of_two(view.view(torch.uint8))
        if not view.isfinite().all():
            raise ValueError(f"{SENT}: {box.checkpoint_name} holds scales that are no numbers")
    if view.numel() == 1 and region_volume(box.source) > 1:  # one scale for all rows
        return view.reshape(()).expand([stop - start for start, stop in box.target])
    return view[_slices(box.source)]


def quantised_pieces(weight: WeightEntry, scale: WeightEntry, box: WeightBox, view: torch.Tensor) -> Iterator[Piece]:
    """A box's part of a plain matrix, with scales over its whole rows, some rows at a time."""
    (first, last), columns = box.source
    *outer, row, column = (start for start, _ in box.target)
    step = max(1, BLOCK_BYTES // max(1, view.shape[1] * view.element_size()))
    for start in range(first, last, step):
        stop = min(start + step, last)
        numbers, scales = quantize_rows(view[start:stop])
        rows = (*((place, place + 1) for place in outer), (row + start - first, row + stop - first))
        yield weight, (*rows, (column, column + columns[1] - columns[0])), numbers[:, slice(*columns)]
        yield scale, (*rows, (0, 1)), scales
