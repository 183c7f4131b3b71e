"""Owns filling a GPU arena from another process's GPU memory on the same host, at the copy engine's speed."""

import time
from collections.abc import Callable, Sequence

import msgspec
import torch

from ramet.srt.model_loader.arena import cuda_copies
from ramet.srt.model_loader.arena.cuda import CudaWeightArena, current_context
from ramet.srt.utils import cuda_driver
from ramet.srt.weights.copy_op import CopyOp

POLL_S = 0.0005


class CudaIpcMemory:
    """Another process's memory, for as long as it is open. Every copy out of it ends before its call does."""

    def __init__(self, handle: bytes, arena: CudaWeightArena) -> None:
        """
        Args:
            arena: what it is copied to, and the GPU that has to see the memory.

        Raises:
            OSError: if the memory can't be opened.
        """
        self._arena = arena
        with current_context(arena.torch_device):
            self._address: int | None = cuda_driver.open_memory(handle)

    def copy(self, ops: Sequence[CopyOp], offset: int, seed_is_alive: Callable[[], bool], timeout_s: float) -> float:
        """Execute operations whose source is the memory from `offset` on.

        The copies run on a stream of their own, beside whatever the seed computes and other sources copy. The memory
        is closed before this returns, whatever happens.

        Returns:
            The seconds that the copies took, by the GPU's clock.

        Raises:
            OSError: if the seed ends before the last byte has been copied.
            TimeoutError: if the copies take longer than `timeout_s`.
        """
        assert self._address is not None, "the memory is closed"
        with current_context(self._arena.torch_device):
            try:
                return _copy(join_neighbours(ops), self._address + offset, self._arena, seed_is_alive, timeout_s)
            finally:
                self.close()

    def close(self) -> None:
        """Give the memory back. May be called again."""
        address, self._address = self._address, None
        if address is not None:
            with current_context(self._arena.torch_device):
                cuda_driver.close_memory(address)


def _copy(
    ops: Sequence[CopyOp], source: int, arena: CudaWeightArena, seed_is_alive: Callable[[], bool], timeout_s: float
) -> float:
    """See `CudaIpcMemory.copy`; `source` is an address. No copy is under way any more afterwards."""
    stream = torch.cuda.Stream(arena.torch_device, priority=-1)  # of the pool that has no capturing ones, too
    try:
        begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record(stream)
        cuda_copies.queue_copies(ops, source, arena.address, stream.cuda_stream)
        done.record(stream)
        deadline = time.monotonic() + timeout_s
        while True:
            is_done = done.query()
            if not seed_is_alive():  # asked afterwards: it lived as long as the copies lasted
                raise OSError("the seed ended while its memory was copied")
            if is_done:
                return begun.elapsed_time(done) / 1e3
            if time.monotonic() > deadline:
                raise TimeoutError(f"the copy from the seed's GPU took more than {timeout_s:g} s")
            time.sleep(POLL_S)
    finally:
        stream.synchronize()


def join_neighbours(ops: Sequence[CopyOp]) -> list[CopyOp]:
    """The same copies with those in one that follow each other on both sides: a GPU copies any length at once."""
    joined: list[CopyOp] = []
    for op in sorted(ops, key=lambda op: op.target_offset):
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.is_contiguous
            and op.is_contiguous
            and op.target_offset == last.target_stop
            and op.source_offset == last.source_offset + last.row_nbytes
        ):
            joined[-1] = msgspec.structs.replace(last, row_nbytes=last.row_nbytes + op.row_nbytes)
        else:
            joined.append(op)
    return joined
