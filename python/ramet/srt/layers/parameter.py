"""Owns how a layer declares a weight: a parameter on the meta device with the boxes that fill it."""

from collections.abc import Sequence

import torch
from torch import nn

from ramet.srt.weights.manifest import WeightBox


def declare_weight(
    shape: Sequence[int], dtype: torch.dtype, boxes: Sequence[WeightBox], *, all_columns: int | None = None
) -> nn.Parameter:
    """A parameter without memory; `boxes` say which checkpoint slices fill it, zeros fill the rest.

    Args:
        all_columns: of the checkpoint's matrix, where those are split over ranks.
    """
    weight = nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device="meta"), requires_grad=False)
    vars(weight)["boxes"] = tuple(boxes)  # a subclass with such a field would make every operation look it up
    vars(weight)["all_columns"] = shape[-1] if all_columns is None else all_columns
    return weight


def shard_box(name: str, shape: Sequence[int], dim: int, start: int, stop: int, target_start: int = 0) -> WeightBox:
    """The box of rows (dim 0) or columns (dim 1) [start, stop) of checkpoint tensor `name` of `shape`.

    They land at `target_start` of the same dimension of the parameter.
    """
    source = [(0, extent) for extent in shape]
    target = list(source)
    source[dim] = (start, stop)
    target[dim] = (target_start, target_start + stop - start)
    return WeightBox(name, tuple(source), tuple(target))


def divide(total: int, parts: int, what: str) -> int:
    """total / parts, for a dimension that must split evenly.

    Raises:
        ValueError: if it does not; the message calls the dimension `what`.
    """
    if total % parts:
        raise ValueError(f"{what} ({total}) can't be split over tp_size {parts}")
    return total // parts
