"""Owns where in a trainer's tensors that lies which an instance's boxes name. Pure; the planner does the rest.

A trainer has its tensors by the names, and in the shapes, of any checkpoint of the model: fused, stacked, or with
another prefix. What would be split for a file is split for a trainer by translating the instance's boxes, so that
planner and checksums speak of the trainer's own tensors.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from ramet.srt.model_loader.checkpoint.bare_decoder import whole_name
from ramet.srt.model_loader.checkpoint.checks import check_checkpoint, is_quantised_here
from ramet.srt.model_loader.checkpoint.idle_tensors import may_be_idle
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo
from ramet.srt.model_loader.checkpoint.source import settle_names
from ramet.srt.model_loader.checkpoint.stacked_experts import STACKED, has_transposed_experts
from ramet.srt.model_loader.checkpoint.whole_model import EMBEDDING, HEAD, WholeModel
from ramet.srt.weights.boxes import Region, contiguous_strides, region_volume
from ramet.srt.weights.manifest import WeightBox, element_size
from ramet.srt.weights.published_model import TRAINER, WholeTensor


class PublishedNames:
    """What a trainer's ranks have together, by the names that an instance's boxes have."""

    def __init__(self, tensors: Sequence[WholeTensor], whole: WholeModel) -> None:
        """
        Args:
            whole: the instance's model.

        Raises:
            ValueError: if the tensors are not those of the model: all of them, and nothing else.
        """
        self._parts: dict[str, tuple[WholeTensor, TensorInfo]] = {}
        stacks = [(name, one.shape) for one in tensors if _is_stacked(name := whole_name(one.name), whole)]
        are_transposed = has_transposed_experts(stacks, whole.hidden_size) if stacks else False
        for one in tensors:
            name, size = whole_name(one.name), element_size(one.dtype)
            volume = region_volume(tuple((0, extent) for extent in one.shape))
            info = TensorInfo(one.dtype, one.shape, 0, volume * size)
            for part, where in settle_names(TRAINER, {name: info}, whole, are_transposed).items():
                if may_be_idle(part, whole):
                    raise ValueError(f"{TRAINER} has {one.name}, which the model has no place for")
                if part in self._parts:
                    raise ValueError(f"{TRAINER} has {part} twice, in {self._parts[part][0].name} and {one.name}")
                self._parts[part] = one, where
        self._known = {part: (TRAINER, info) for part, (_, info) in self._parts.items()}
        check_checkpoint(self._known, whole, TRAINER)
        if HEAD in self._parts and whole.is_tied and whole.has_head:
            raise ValueError(
                f"{TRAINER} has an output head of its own ({HEAD} differs from {EMBEDDING}), which this model has not"
            )
        self.is_quantised_here = is_quantised_here(self._known, whole)

    def has(self, name: str) -> bool:
        """Whether it has a tensor that a box names; it may lack scales of the KV cache, which are 1 then."""
        return name in self._parts

    def dtype(self, name: str) -> str:
        """Of a tensor that a box names."""
        return self._parts[name][1].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Of all of a tensor that a box names."""
        return self._parts[name][1].shape

    def translate(self, box: WeightBox) -> WeightBox:
        """The same box by the trainer's own tensor. Raises ValueError where that lies in another order there."""
        one, info = self._parts[box.checkpoint_name]
        return replace(box, checkpoint_name=one.name, source=locate_region(one, info, box.source))


def _is_stacked(name: str, whole: WholeModel) -> bool:
    return ".experts." in name and STACKED.fullmatch(name) is not None and name not in whole.shapes


def locate_region(one: WholeTensor, part: TensorInfo, region: Region) -> Region:
    """A region of a part of a tensor, in coordinates of all of it.

    Args:
        part: where it lies in the tensor, row-major.

    Raises:
        ValueError: if its dimensions lie in another order, or with steps.
    """
    if len(region) != len(part.shape) or any(
        stop > extent for (_, stop), extent in zip(region, part.shape, strict=True)
    ):
        raise ValueError(f"{TRAINER} has {one.name} in the shape {one.shape}, which {region} is no part of")
    strides = contiguous_strides(one.shape, element_size(one.dtype))
    rest, found = part.offset, list[tuple[int, int]]()
    for stride in strides:
        found.append((rest // stride, rest // stride + 1))
        rest %= stride
    dim = 0
    for (start, stop), stride, extent in zip(region, part.all_strides, part.shape, strict=True):
        if extent == 1:
            continue
        while dim < len(strides) and (strides[dim] != stride or one.shape[dim] == 1):
            dim += 1
        if dim == len(strides):
            raise ValueError(f"{TRAINER} has {one.name} turned round or interleaved: publish its matrices one by one")
        first = found[dim][0]
        found[dim] = first + start, first + stop
        dim += 1
    return tuple(found)
