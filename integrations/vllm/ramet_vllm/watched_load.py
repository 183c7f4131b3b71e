"""Owns the watching of a model that loads its weights: which slice of which checkpoint tensor it puts where.

The model's own loading code runs on tensors without memory. So its rules alone say how tensors are named, fused and
sharded, and nothing is copied. Whatever is more than a copy of a slice is refused: bytes alone could not do it again.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from ramet.srt.weights.boxes import Region, intersect
from ramet.srt.weights.manifest import WeightBox, box_shape
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ramet_vllm.views import NoRegion, locate_view

_ATEN = torch.ops.aten
# What gives the same elements somewhere else, or in another layout: slices of them are slices of the tensor's.
_SAME_ELEMENTS = (_ATEN._to_copy.default, _ATEN.clone.default, _ATEN.contiguous.default, _ATEN.lift_fresh.default)
_FILLS = (_ATEN.fill_.Scalar, _ATEN.zero_.default)


class CannotMap(ValueError):
    """A model does more with its weights than to copy slices of them, so it can't take them from an instance."""


class CheckpointTensor(NamedTuple):
    """What is known of a tensor of a checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Placed(NamedTuple):
    """What a model's loading put into its tensors."""

    boxes: dict[str, list[WeightBox]]  # by the names of the model's tensors
    zeros: dict[str, list[Region]]  # the parts that it cleared


def watch_load(
    load_weights: Callable[[Iterator[tuple[str, torch.Tensor]]], object],
    targets: Mapping[str, torch.Tensor],
    tensors: Iterable[CheckpointTensor],
    *,
    readable: Collection[str] = (),
) -> Placed:
    """Have a model load tensors that are not there, and note what it would copy where.

    Args:
        load_weights: the model's own; takes names and tensors.
        targets: the model's tensors by their names; they are left as they are.
        tensors: of the checkpoint.
        readable: names of those of the model's tensors that hold something already, which its loading may look up.

    Raises:
        CannotMap: if the model does anything else with them, or does not know one of them.
    """
    watch = _Watch(targets, readable)

    def handed_out() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in tensors:
            watch.current = tensor.name
            yield tensor.name, watch.hand_out(tensor)

    try:
        with watch:
            load_weights(handed_out())
    except CannotMap:
        raise
    except Exception as error:  # noqa: BLE001  whatever the model's code raises over a tensor is the reason
        raise CannotMap(f"the model does not take {watch.current}: {type(error).__name__}: {error}") from error
    return Placed(watch.boxes, watch.zeros)


class _Watch(TorchDispatchMode):
    """Sees every operation on tensors while it is entered, and carries out none that would write to the model's."""

    def __init__(self, targets: Mapping[str, torch.Tensor], readable: Collection[str]) -> None:
        super().__init__()
        self._readable = readable
        self.current = "its weights"
        self.boxes: dict[str, list[WeightBox]] = {}
        self.zeros: dict[str, list[Region]] = {}
        self._targets: dict[int, tuple[str, torch.Tensor]] = {}
        self._shared: set[str] = set()  # tables that several layers look up in one piece of memory
        for name, target in targets.items():
            known, _ = self._targets.setdefault(_storage(target), (name, target))
            if known == name:
                continue
            if name not in readable or known not in readable:
                raise CannotMap(f"{name} and {known} of the model share memory")
            self._shared.add(known)
        self._handed_out: dict[int, CheckpointTensor] = {}
        self._kept: list[torch.Tensor] = []  # what was handed out, so that nothing else gets its place

    def hand_out(self, tensor: CheckpointTensor) -> torch.Tensor:
        """A tensor without memory that stands for one of the checkpoint."""
        made = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
        self._handed_out[_storage(made)] = tensor
        self._kept.append(made)
        return made

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors_in((*args, *kwargs.values())))
        keys = [_storage(one) for one in given]
        sources = [one for one, key in zip(given, keys, strict=True) if key in self._handed_out]
        targets = [one for one, key in zip(given, keys, strict=True) if key in self._targets]
        if not sources and not targets:
            return func(*args, **kwargs)
        if func is _ATEN.copy_.default and targets and sources and args[0] is targets[0] and args[1] is sources[0]:
            self._note_copy(args[0], args[1])
            return args[0]
        if func in _FILLS and targets and (func is _FILLS[1] or args[1] == 0):
            self._note_zeros(args[0])
            return args[0]
        if sources and func in _SAME_ELEMENTS and kwargs.get("dtype", args[0].dtype) in (None, args[0].dtype):
            return _ATEN.alias.default(args[0])
        if _writes(func):
            raise self._refusal(func, sources, targets)
        result = func(*args, **kwargs)
        if not sources and all(self._may_be_read(one) for one in targets):
            return result
        made = [result] if isinstance(result, torch.Tensor) else tree_flatten(result)[0]
        if any(not isinstance(one, torch.Tensor) or _storage(one) not in keys for one in made):
            raise self._refusal(func, sources, targets)
        return result

    def _may_be_read(self, target: torch.Tensor) -> bool:
        name, _ = self._targets[_storage(target)]
        return name in self._readable and name not in self.boxes

    def _refusal(self, func: Any, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> CannotMap:
        names = [self._handed_out[_storage(one)].name for one in sources]
        names += [self._targets[_storage(one)][0] for one in targets]
        what = ", ".join(dict.fromkeys(names))
        return CannotMap(
            f"while loading {self.current} the model computes with {what} ({func}): weights that are more than copies "
            "of the checkpoint's can't be taken from an instance"
        )

    def _note_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if not target.numel():
            return
        tensor = self._handed_out[_storage(source)]
        name, whole = self._targets[_storage(target)]
        if name in self._shared:
            raise CannotMap(f"{tensor.name} goes into {name}, whose memory others of the model's tensors share")
        try:
            source_region = locate_view(int(source.storage_offset()), source.shape, source.stride(), tensor.shape)
            target_region = _region_in(target, whole)
        except NoRegion as error:
            raise CannotMap(f"{tensor.name} can't be put into {name} as slices: {error}") from error
        box = WeightBox(tensor.name, source_region, target_region)
        if box_shape(source_region) != box_shape(target_region):
            raise CannotMap(f"{tensor.name} is given another shape in {name}: {source_region} becomes {target_region}")
        boxes = self.boxes.setdefault(name, [])
        if box not in boxes[-1:]:
            boxes.append(box)

    def _note_zeros(self, target: torch.Tensor) -> None:
        if not target.numel():
            return
        name, whole = self._targets[_storage(target)]
        try:
            region = _region_in(target, whole)
        except NoRegion as error:
            raise CannotMap(f"a part of {name} that is cleared is no slice: {error}") from error
        if any(intersect(region, box.target) for box in self.boxes.get(name, ())):
            raise CannotMap(f"a part of {name} is cleared after it has been loaded")
        self.zeros.setdefault(name, []).append(region)


def _tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


@functools.cache
def _writes(func: Any) -> bool:
    """Whether an operation changes one of its arguments."""
    return any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments)


def _storage(tensor: torch.Tensor) -> int:
    """What tells one piece of memory from another, also where there is none."""
    return tensor.untyped_storage()._cdata


def _region_in(view: torch.Tensor, whole: torch.Tensor) -> Region:
    return locate_view(
        int(view.storage_offset() - whole.storage_offset()), view.shape, view.stride(), tuple(whole.shape)
    )
