"""Ranks of one node that add up over shared memory: each is a process of its own, forked after the imports.

    python test/exchange_ranks.py SCENARIO NUM_RANKS FOLDER

It ends with an error if a rank got something else than it should.
"""

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.distributed import communication_op, host_exchange, parallel_state
from ramet.srt.distributed.host_exchange import DTYPES, HostExchange
from ramet.srt.distributed.node_memory import RANK_NBYTES, NodeMemory
from ramet.srt.layers.cpu_kernels import build

TIMEOUT_S = 30.0
SHORT_TIMEOUT_S = 1.0
# Of tensors: alone, not a vector's multiple, summed whole, in shares, and in several pieces of those.
SIZES = (1, 7, 64, 1000, 14336, 40000, 100_003, 2 * RANK_NBYTES // 4 + 5)
ROUNDS = 300
NUM_LATE = 25  # operations before the last rank has the kernels


def use_kernels() -> None:
    host_exchange.use_kernels(ctypes.CDLL(str(build.build())))


def numbers(rank: int, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a rank brings along: every rank can make it for all."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + rank)).to(dtype)


def sum_of(parts: list[torch.Tensor]) -> torch.Tensor:
    """In float32, in the order of the ranks, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def opened(memory: NodeMemory, rank: int, num_ranks: int, timeout_s: float) -> HostExchange:
    """An exchange that all ranks have opened."""
    use_kernels()
    piece = memory.cut(range(num_ranks))
    assert piece is not None
    exchange = HostExchange(memory.map(piece), rank, num_ranks, timeout_s)
    deadline = time.monotonic() + TIMEOUT_S
    while not exchange.takes(torch.float32, 1):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return exchange


def equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit by bit."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.equal(actual, expected), (actual.float() - expected.float()).abs().max()


def check_values(memory: NodeMemory, rank: int, num_ranks: int, _folder: str) -> None:
    """Every operation, type and size, against what one process computes."""
    exchange = opened(memory, rank, num_ranks, TIMEOUT_S)
    everyone = range(num_ranks)
    for dtype in DTYPES:
        for size in SIZES:
            parts = [numbers(one, size, (size,), dtype) for one in everyone]
            mine = parts[rank].clone()
            exchange.sum(mine)
            equal(mine, sum_of(parts))
            rows = [numbers(one, size, (3, size), dtype) for one in everyone]
            equal(exchange.gather_columns(rows[rank]), torch.cat(rows, dim=-1))
            turned = [part.t() for part in rows]  # not contiguous
            exchange.sum(turned[rank])
            equal(rows[rank], sum_of([numbers(one, size, (3, size), dtype) for one in everyone]))
        for sizes in ([5, 0, 1, 64][:num_ranks], [0, 700, 3, 9][:num_ranks], [1] * num_ranks):
            rows = [numbers(one, 3, (sizes[one], 999), dtype) for one in everyone]
            equal(exchange.gather_rows(rows[rank], sizes), torch.cat(rows))
            parts = [numbers(one, 4, (sum(sizes), 999), dtype) for one in everyone]
            equal(exchange.sum_shares(parts[rank], sizes), sum_of(parts).split(sizes)[rank])


def check_rounds(memory: NodeMemory, rank: int, num_ranks: int, _folder: str) -> None:
    """Operations of all kinds and sizes, one behind the other, with ranks that come late now and then."""
    exchange = opened(memory, rank, num_ranks, TIMEOUT_S)
    choices = torch.randint(0, 1 << 30, (ROUNDS, 2), generator=torch.Generator().manual_seed(7)).tolist()
    for number, (kind, size) in enumerate(choices):
        parts = [
            numbers(one, number, (4, 1 + size % (50_000 if size % 9 == 0 else 500)), torch.bfloat16)
            for one in range(num_ranks)
        ]
        if number % 40 == 10 * rank:
            time.sleep(0.02)
        if kind % 3 == 0:
            equal(exchange.gather_columns(parts[rank]), torch.cat(parts, dim=-1))
        else:
            exchange.sum(parts[rank].clone() if kind % 3 == 1 else parts[rank])
            if kind % 3 == 2:
                expected = [numbers(one, number, parts[rank].shape, torch.bfloat16) for one in range(num_ranks)]
                equal(parts[rank], sum_of(expected))


def operations(parallel: ParallelConfig, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What this rank gets from each operation of layers, and what it should get."""
    rank, everyone = parallel.tp_rank, range(parallel.tp_size)
    parts = [numbers(one, number, (2, 8), torch.bfloat16) for one in everyone]
    yield communication_op.tensor_model_parallel_all_gather(parts[rank]), torch.cat(parts, dim=-1)
    halves = [part.clone() for part in parts]
    for part in halves:
        part.copy_((part * 4).round())  # whole numbers: their sum is the same in whatever order
    yield communication_op.tensor_model_parallel_all_reduce(halves[rank].clone()), sum_of(halves)
    if parallel.attn_dp_size == 1:
        return
    sizes = [2 + group for group in range(parallel.attn_dp_size)]
    rows = [torch.full((size, 3), float(number + group)) for group, size in enumerate(sizes)]
    own = parallel.attn_dp_rank
    yield communication_op.gather_attention_groups(rows[own], sizes), torch.cat(rows)
    ones = torch.full((sum(sizes), 3), float(1 + rank))
    expected = torch.full((sizes[own], 3), float(sum(1 + one for one in everyone)))
    yield communication_op.sum_for_attention_groups(ones, sizes, own), expected


def check_change(memory: NodeMemory, rank: int, num_ranks: int, folder: str) -> None:
    """Ranks that get the kernels one after the other, in the middle of what they do."""
    run_groups(memory, rank, num_ranks, folder, NUM_LATE)


def check_without(memory: NodeMemory, rank: int, num_ranks: int, folder: str) -> None:
    """The last rank never gets them."""
    run_groups(memory, rank, num_ranks, folder, 1 << 30)


def run_groups(memory: NodeMemory, rank: int, num_ranks: int, folder: str, when: int) -> None:
    groups = num_ranks // 2 if num_ranks > 2 else 1
    parallel = ParallelConfig.of_rank(rank, tp_size=num_ranks, attn_dp_size=groups)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    parallel_state.init_process_groups(parallel, store, "gloo", TIMEOUT_S, memory)
    exchanges = parallel_state._groups.exchanges
    assert len(exchanges) == (1 if groups == 1 else 3)
    for number in range(2 * NUM_LATE):
        if number == (when if rank == num_ranks - 1 else 7 * rank):
            use_kernels()
        if number == when + 3:  # one to say so, one to be heard, and the one that is begun
            assert all(exchange._library is not None for exchange in exchanges.values())
        for actual, expected in operations(parallel, number):
            equal(actual, expected)
        if number < when:
            assert exchanges[parallel_state.get_tp_group()]._library is None
    dist.barrier()
    dist.destroy_process_group()


def lose_last(memory: NodeMemory, rank: int, num_ranks: int, folder: str) -> None:
    """The last rank is killed while the others wait for it."""
    exchange = opened(memory, rank, num_ranks, TIMEOUT_S)
    exchange.sum(torch.ones(10))
    last = num_ranks - 1
    if rank == last:
        Path(folder, "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(2):  # and from then on
        begin = time.monotonic()
        error = failure_of(lambda: exchange.sum(torch.ones(100_000)))
        # Whoever notices first ends too; a rank that waits for that one notices it in turn.
        assert isinstance(error, dist.DistNetworkError) and "has ended" in str(error)
        assert time.monotonic() - begin < 3
    if num_ranks == 2:
        assert Path(folder, "pid").read_text() in str(error)


def wait_for_late(memory: NodeMemory, rank: int, num_ranks: int, folder: str) -> None:
    """The last rank lives, but does not come."""
    exchange = opened(memory, rank, num_ranks, SHORT_TIMEOUT_S)
    if rank == num_ranks - 1:
        deadline = time.monotonic() + TIMEOUT_S
        while not all(Path(folder, f"seen-{one}").exists() for one in range(rank)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return
    begin = time.monotonic()
    error = failure_of(lambda: exchange.sum(torch.ones(10)))
    assert isinstance(error, dist.DistError) and f"rank {num_ranks - 1} of {num_ranks}" in str(error)
    assert "did not come to an operation within 1 s (--dist-timeout)" in str(error)
    assert SHORT_TIMEOUT_S <= time.monotonic() - begin < SHORT_TIMEOUT_S + 2
    Path(folder, f"seen-{rank}").touch()


def differ(memory: NodeMemory, rank: int, num_ranks: int, _folder: str) -> None:
    """The ranks are at operations that don't fit together: none gets numbers."""
    exchange = opened(memory, rank, num_ranks, TIMEOUT_S)
    error = failure_of(lambda: exchange.sum(torch.ones(10 + rank)))
    assert isinstance(error, dist.DistError)
    assert "is at another operation" in str(error) or "has ended" in str(error)


def failure_of(call: Callable[[], None]) -> Exception:
    try:
        call()
    except RuntimeError as error:
        return error
    raise AssertionError("it did not fail")


SCENARIOS = {
    one.__name__: one
    for one in (check_values, check_rounds, check_change, check_without, lose_last, wait_for_late, differ)
}


def main(name: str, num_ranks: int, folder: str) -> int:
    """Run a scenario on all ranks; 0 if each of them ended as it should."""
    torch.set_num_threads(1)
    memory = NodeMemory(NodeMemory.create(num_ranks), range(num_ranks))
    children = []
    for rank in range(num_ranks):
        if (child := os.fork()) == 0:
            code = 1
            try:
                signal.alarm(int(2 * TIMEOUT_S))
                with torch.inference_mode():
                    SCENARIOS[name](memory, rank, num_ranks, folder)
                code = 0
            except Exception:
                logging.exception("rank %d", rank)
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    expected = [0] * num_ranks
    if name == "lose_last":
        expected[-1] = -signal.SIGKILL
    return 0 if codes == expected else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
