"""Owns the process groups of this rank. Sizes and coordinates live in ParallelConfig."""

import datetime
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.distributed.host_exchange import HostExchange
from ramet.srt.distributed.node_memory import NodeMemory


@dataclass
class _Groups:
    """The groups that this rank is in; None where it is the only member."""

    tp: dist.ProcessGroup | None = None
    attn_tp: dist.ProcessGroup | None = None  # ranks that compute attention for the same sequences
    attn_dp: dist.ProcessGroup | None = None  # those that have the same heads in other attention groups
    replica: dist.ProcessGroup | None = None
    parallel: ParallelConfig = ParallelConfig()
    exchanges: dict[dist.ProcessGroup, HostExchange] = field(default_factory=dict)  # of those on this node


_groups = _Groups()


def init_process_groups(
    parallel: ParallelConfig, store: dist.Store, backend: str, timeout_s: float, memory: NodeMemory | None = None
) -> None:
    """Join the instance's ranks into groups. Every rank calls it; with one rank in the world there is nothing to do.

    Args:
        backend: "gloo" or "nccl".
        timeout_s: for every operation between the ranks.
        memory: over which ranks of one node add up, if they compute on CPUs and may do so.
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
    add_group = functools.partial(_add_group, groups, memory, timeout_s)
    replica_size = parallel.pp_size * parallel.tp_size
    for start in range(0, parallel.world_size, replica_size):  # every rank makes every group, in the same order
        replica = _new_group(list(range(start, start + replica_size)), parallel)
        groups.replica = replica or groups.replica
        for stage in range(parallel.pp_size):
            first = start + stage * parallel.tp_size
            tp_ranks = list(range(first, first + parallel.tp_size))
            groups.tp = add_group(tp_ranks) or groups.tp
            if parallel.attn_dp_size > 1:
                _add_attention_groups(groups, tp_ranks, add_group)
    _groups = groups


def _add_attention_groups(
    groups: _Groups, tp_ranks: list[int], add_group: Callable[[list[int]], dist.ProcessGroup | None]
) -> None:
    """Split a tensor-parallel group into its attention groups, and those across them."""
    size = groups.parallel.attention.tp_size
    if size == 1:
        groups.attn_dp = groups.tp
        return
    for start in range(0, len(tp_ranks), size):
        groups.attn_tp = add_group(tp_ranks[start : start + size]) or groups.attn_tp
    for place in range(size):
        groups.attn_dp = add_group(tp_ranks[place::size]) or groups.attn_dp


def _add_group(
    groups: _Groups, memory: NodeMemory | None, timeout_s: float, ranks: list[int]
) -> dist.ProcessGroup | None:
    """A group that adds up, over the node's memory if all of it is on one."""
    group = _new_group(ranks, groups.parallel)
    if memory is None or len(ranks) == 1:
        return group
    piece = memory.cut(ranks)
    if piece is not None and group is not None:
        rank = ranks.index(groups.parallel.world_rank)
        groups.exchanges[group] = HostExchange(memory.map(piece), rank, len(ranks), timeout_s)
    return group


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


def get_exchange(group: dist.ProcessGroup, dtype: torch.dtype, fewest: int) -> HostExchange | None:
    """What the group's next operation goes by in place of torch.distributed, if it does; see HostExchange.takes."""
    exchange = _groups.exchanges.get(group)
    return exchange if exchange is not None and exchange.takes(dtype, fewest) else None


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
