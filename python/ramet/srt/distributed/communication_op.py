"""Owns the collective operations that layers use. With one rank in the group each returns its input."""

import torch
import torch.distributed as dist

from ramet.srt.distributed.parallel_state import get_tp_group


def tensor_model_parallel_all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over the tensor-parallel group, in place."""
    group = get_tp_group()
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def tensor_model_parallel_all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate `tensor` [..., n] of every tensor-parallel rank along its last dimension: [..., n * tp_size]."""
    group = get_tp_group()
    if group is None:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
