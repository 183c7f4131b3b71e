"""Owns the process groups of this rank. Sizes and coordinates live in ParallelConfig."""

import datetime
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ramet.srt.configs.parallel_config import ParallelConfig


@dataclass
class _Groups:
    """The groups that this rank is in; None where it is the only member."""

    tp: dist.ProcessGroup | None = None
    attn_tp: dist.ProcessGroup | None = None  # ranks that compute attention for the same sequences
    attn_dp: dist.ProcessGroup | None = None  # those that have the same heads in other attention groups
    replica: dist.ProcessGroup | None = None
    parallel: ParallelConfig = ParallelConfig()


_groups = _Groups()


def init_process_groups(parallel: ParallelConfig, store: dist.Store, backend: str, timeout_s: float) -> None:
    """Join the instance's ranks into groups. Every rank calls it; with one rank in the world there is nothing to do.

    Args:
        backend: "gloo" or "nccl".
        timeout_s: for every operation between the ranks.
    """
    global _groups
    if parallel.world_size == 1:
        return
    dist.init_process_group(
        backend,
        store=store,
        rank=parallel.world_rank,
        world_size=parallel.world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    groups = _Groups(parallel=parallel)
    replica_size = parallel.pp_size * parallel.tp_size
    for start in range(0, parallel.world_size, replica_size):  # every rank makes every group, in the same order
        replica = _new_group(list(range(start, start + replica_size)), parallel)
        groups.replica = replica or groups.replica
        for stage in range(parallel.pp_size):
            first = start + stage * parallel.tp_size
            tp_ranks = list(range(first, first + parallel.tp_size))
            groups.tp = _new_group(tp_ranks, parallel) or groups.tp
            if parallel.attn_dp_size > 1:
                _add_attention_groups(groups, tp_ranks, parallel)
    _groups = groups


def _add_attention_groups(groups: _Groups, tp_ranks: list[int], parallel: ParallelConfig) -> None:
    """Split a tensor-parallel group into its attention groups, and those across them."""
    size = parallel.attention.tp_size
    if size == 1:
        groups.attn_dp = groups.tp
        return
    for start in range(0, parallel.tp_size, size):
        groups.attn_tp = _new_group(tp_ranks[start : start + size], parallel) or groups.attn_tp
    for place in range(size):
        groups.attn_dp = _new_group(tp_ranks[place::size], parallel) or groups.attn_dp


def _new_group(ranks: list[int], parallel: ParallelConfig) -> dist.ProcessGroup | None:
    """A group of `ranks`; None for those outside it, and for a single rank."""
    if len(ranks) == 1:
        return None
    group = dist.new_group(ranks)
    return group if parallel.world_rank in ranks else None


def get_tp_group() -> dist.ProcessGroup | None:
    """The tensor-parallel group, or None when this rank is its only member."""
    return _groups.tp


def get_attention_tp_group() -> dist.ProcessGroup | None:
    """With data-parallel attention the ranks of this one's attention group, or None when it is the only one."""
    return _groups.attn_tp


def get_attention_dp_group() -> dist.ProcessGroup | None:
    """The ranks that have this one's heads in all attention groups, in their order; None if there is one group."""
    return _groups.attn_dp


def min_over_replica(value: int) -> int:
    """The smallest of the values that the ranks of the replica give."""
    if _groups.replica is None:
        return value
    tensor = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MIN, group=_groups.replica)
    return int(tensor.item())


def gather_over_replica(data: bytes) -> list[bytes]:
    """What each rank of the replica gives, in the order of the ranks."""
    if _groups.replica is None:
        return [data]
    num_ranks = dist.get_world_size(_groups.replica)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(num_ranks)]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=_groups.replica)
    lengths = [int(size.item()) for size in sizes]
    own = torch.zeros(max(lengths), dtype=torch.uint8)
    own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    gathered = [torch.empty_like(own) for _ in range(num_ranks)]
    dist.all_gather(gathered, own, group=_groups.replica)
    return [one[:length].numpy().tobytes() for one, length in zip(gathered, lengths, strict=True)]


def send_to_next_stage(tensor: torch.Tensor) -> dist.Work:
    """Begin to send `tensor` to this rank's neighbour in the next pipeline stage. Keep it until the work is done."""
    work = dist.isend(tensor, _groups.parallel.world_rank + _groups.parallel.tp_size)
    assert work is not None
    return work


def receive_from_previous_stage(tensor: torch.Tensor) -> None:
    """Fill `tensor` with what this rank's neighbour in the previous stage sends."""
    dist.recv(tensor, _groups.parallel.world_rank - _groups.parallel.tp_size)
