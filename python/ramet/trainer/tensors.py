"""Owns what of a training process's tensors is published: which slices of which tensors of a checkpoint they hold."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from ramet.srt.weights.manifest import WeightBox, box_shape

COMPILED = "_orig_mod"  # of a module in a module that torch.compile has made
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Ranges: TypeAlias = tuple[tuple[int, int], ...]  # (start, stop) along each dimension


@dataclass(frozen=True)
class Slice:
    """A slice of a checkpoint's tensor that lies in a tensor of this process.

    Attributes:
        name: of the tensor, as checkpoints of the model have it.
        shape: of all of it.
        source: which part of it that is: (start, stop) along each of its dimensions.
        target: where that lies in the local tensor; None: it is all of that.
    """

    name: str
    shape: tuple[int, ...]
    source: Ranges
    target: Ranges | None = None


class Sliced:
    """A tensor that holds slices of a checkpoint's tensors: q, k and v of this tensor-parallel rank, say."""

    def __init__(self, tensor: torch.Tensor, *slices: Slice) -> None:
        self.tensor = tensor
        self.slices = slices


Value: TypeAlias = torch.Tensor | Sliced
Weights: TypeAlias = torch.nn.Module | Mapping[str, Value]


@dataclass(frozen=True)
class Held:
    """One tensor to publish, as build_weight_manifest takes it."""

    name: str
    tensor: torch.Tensor
    dtype: torch.dtype  # as which it is published
    boxes: tuple[WeightBox, ...]
    shapes: dict[str, tuple[int, ...]]  # of the whole tensors that its boxes are of

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape


def hold(weights: Weights, dtype: torch.dtype | None) -> list[Held]:
    """What a module, or a mapping by name, holds. A head that is the embedding's table is left out.

    Args:
        dtype: as which floating-point tensors are published; None: as they are.

    Raises:
        ValueError: for what can't be published: partial sums, boxes that don't fit, nothing at all.
        TypeError: for weights that are no module and no mapping by name.
    """
    values = _named(weights)
    if HEAD in values and EMBEDDING in values and _are_same(values[HEAD], values[EMBEDDING]):
        del values[HEAD]
    found = [held for name, value in values.items() for held in _hold_one(name, value, dtype)]
    if not found:
        raise ValueError("there is no tensor to publish")
    kinds = {held.tensor.device for held in found}
    if len(kinds) > 1:
        raise ValueError(f"all tensors must be on one device; these are on {', '.join(sorted(map(str, kinds)))}")
    shapes: dict[str, tuple[int, ...]] = {}
    for held in found:
        for name, shape in held.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(f"{name} is given with the shapes {shapes[name]} and {shape}")
    return found


def _named(weights: Weights) -> dict[str, Value]:
    """Each tensor by its name in a checkpoint: without what torch.compile and data parallelism put around modules."""
    if isinstance(weights, torch.nn.Module):
        weights = getattr(weights, COMPILED, weights)
        weights = weights.module if isinstance(weights, DistributedDataParallel) else weights
    elif not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a module, or a mapping of tensors by name; got a {type(weights).__name__}")
    values = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
    found: dict[str, Value] = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise TypeError(f"names of tensors must be strings; got {name!r}")
        plain = name.replace(f"{COMPILED}.", "")
        if plain in found:
            raise ValueError(f"there are two tensors {plain}")
        found[plain] = value
    return found


def _hold_one(name: str, value: Value, dtype: torch.dtype | None) -> Iterator[Held]:
    if isinstance(value, Sliced):
        tensor, slices = value.tensor, value.slices
    elif isinstance(value, DTensor):
        tensor, slices = _own_shard(name, value)
    elif isinstance(value, torch.Tensor):
        whole = tuple((0, extent) for extent in value.shape)
        tensor, slices = value, (Slice(name, tuple(value.shape), whole),)
    else:
        raise ValueError(f"{name} is a {type(value).__name__}, not a tensor")
    if isinstance(tensor, DTensor):
        raise ValueError(f"{name}: slices are of local tensors; give the DTensor itself")
    tensor = tensor.detach()
    if not tensor.numel():
        return
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise ValueError(f"{name} is a {tensor.layout} tensor on {tensor.device}")
    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    yield Held(name, tensor, kind, tuple(_box(name, tensor, one) for one in slices), {s.name: s.shape for s in slices})


def _box(name: str, tensor: torch.Tensor, one: Slice) -> WeightBox:
    target = one.target if one.target is not None else tuple((0, extent) for extent in tensor.shape)
    fits = len(one.source) == len(one.shape) and all(
        0 <= start < stop <= extent for (start, stop), extent in zip(one.source, one.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: {one.source} is no part of {one.name} of the shape {one.shape}")
    has_room = len(target) == tensor.dim() and all(
        0 <= start < stop <= extent for (start, stop), extent in zip(target, tensor.shape, strict=True)
    )
    if not has_room or box_shape(one.source) != box_shape(target):
        raise ValueError(f"{name}: {one.source} of {one.name} does not fit {target} of a {tuple(tensor.shape)} tensor")
    return WeightBox(one.name, one.source, target)


def _own_shard(name: str, value: DTensor) -> tuple[torch.Tensor, tuple[Slice, ...]]:
    """What this rank has of a tensor that is sharded over a mesh: by FSDP2, tensor parallelism, or both."""
    if any(placement.is_partial() for placement in value.placements):
        raise ValueError(f"{name} is a partial sum on each rank: redistribute it first")
    local = value.to_local()
    shape, start = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    if tuple(shape) != tuple(local.shape):
        raise ValueError(f"{name}: a shard of {tuple(local.shape)} where its placements say {tuple(shape)}")
    source = tuple((first, first + extent) for first, extent in zip(start, shape, strict=True))
    return local, (Slice(name, tuple(value.shape), source),) if local.numel() else ()


def _are_same(head: Value, embedding: Value) -> bool:
    """Whether a head holds what the embedding's table does, as far as this rank has both."""
    if isinstance(head, Sliced) or isinstance(embedding, Sliced):
        return False
    if isinstance(head, DTensor) and isinstance(embedding, DTensor):
        if head.placements != embedding.placements or head.shape != embedding.shape:
            return False
        head, embedding = head.to_local(), embedding.to_local()
    if head.shape != embedding.shape or head.dtype != embedding.dtype or head.device != embedding.device:
        return False
    is_one = head.data_ptr() == embedding.data_ptr() and head.stride() == embedding.stride()
    return is_one or torch.equal(head, embedding)
