"""Owns the process groups of this rank. Layers ask here which group they reduce over; sizes live in ParallelConfig."""

import torch.distributed as dist

_tp_group: dist.ProcessGroup | None = None


def set_tp_group(group: dist.ProcessGroup | None) -> None:
    """Make `group` the tensor-parallel group of this process; None for a single rank."""
    global _tp_group
    _tp_group = group


def get_tp_group() -> dist.ProcessGroup | None:
    """The tensor-parallel group, or None when this rank is its only member."""
    return _tp_group
