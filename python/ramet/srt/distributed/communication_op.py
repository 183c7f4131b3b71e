"""Owns the collective operations that layers use. With one rank in the group each returns its input."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ramet.srt.distributed.parallel_state import (
    get_attention_dp_group,
    get_attention_tp_group,
    get_exchange,
    get_tp_group,
)


def tensor_model_parallel_all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over the tensor-parallel group, in place."""
    return _all_reduce(tensor, get_tp_group())


def tensor_model_parallel_all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate `tensor` [..., n] of every tensor-parallel rank along its last dimension: [..., n * tp_size]."""
    group = get_tp_group()
    if group is None:
        return tensor
    if (exchange := get_exchange(group, tensor.dtype, tensor.numel())) is not None:
        return exchange.gather_columns(tensor)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def gather_attention_groups(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The rows of all attention groups, one group behind the other, from those of this rank's own: one exchange.

    Args:
        tensor: [own size, n], equal on the ranks of a group.
        sizes: rows of each group, known on the host.

    Returns:
        [sum of sizes, n], the same on every rank.
    """
    group, num_groups = get_attention_dp_group(), len(sizes)
    if group is not None and (exchange := get_exchange(group, tensor.dtype, min(sizes))) is not None:
        return exchange.gather_rows(tensor, sizes)
    out = tensor.new_empty((sum(sizes), *tensor.shape[1:]))
    dist.all_to_all_single(out, tensor.repeat(num_groups, 1), list(sizes), [len(tensor)] * num_groups, group=group)
    return out


def sum_for_attention_groups(tensor: torch.Tensor, sizes: Sequence[int], own: int) -> torch.Tensor:
    """The sum over all tensor-parallel ranks of the rows that belong to this rank's attention group: one exchange.

    Each part goes to the rank that needs it, which adds up in the order of the ranks; a second exchange, of these rows
    alone, adds up what the ranks of an attention group have, where there are several.

    Args:
        tensor: [sum of sizes, n], this rank's part of the sum.
        sizes: rows of each group, known on the host.
        own: this rank's group.

    Returns:
        [sizes[own], n], equal on the ranks of a group.
    """
    num_groups, size, group = len(sizes), sizes[own], get_attention_dp_group()
    if group is not None and (exchange := get_exchange(group, tensor.dtype, min(sizes))) is not None:
        return attention_all_reduce(exchange.sum_shares(tensor, sizes))
    parts = tensor.new_empty((num_groups * size, *tensor.shape[1:]))
    dist.all_to_all_single(parts, tensor.contiguous(), [size] * num_groups, list(sizes), group=group)
    return attention_all_reduce(parts.unflatten(0, (num_groups, size)).sum(0))


def attention_all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over the ranks of this one's attention group, in place."""
    return _all_reduce(tensor, get_attention_tp_group())


def _all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return tensor
    if (exchange := get_exchange(group, tensor.dtype, tensor.numel())) is not None:
        exchange.sum(tensor)
    else:
        dist.all_reduce(tensor, group=group)
    return tensor
