"""Owns a GPU's memory between processes of a host: lending it, and copying from it at the copy engine's speed."""

import contextlib
import time
from collections.abc import Callable, Sequence

import torch

from ramet.srt.model_loader.arena import cuda_copies
from ramet.srt.model_loader.arena.base import LentFile, LentMemory, SeedMemory
from ramet.srt.utils import cuda_driver, cuda_virtual_memory
from ramet.srt.utils.device import current_context
from ramet.srt.weights.copy_op import CopyOp, join_neighbours

POLL_S = 0.0005


def lend_memory(address: int, device: torch.device) -> tuple[bytes, int]:
    """A CUDA IPC handle of the allocation around an address, and where in it the address is.

    Raises:
        OSError: if the memory can't be lent to other processes.
    """
    with current_context(device):
        return cuda_driver.export_memory(address)


class CudaIpcMemory(SeedMemory):
    """Another process's memory. Every copy out of it ends before its call does."""

    def __init__(self, share: LentMemory | LentFile, target: int, device: torch.device) -> None:
        """
        Args:
            target: address of the arena that it is copied to.
            device: the GPU of that arena, which has to see the memory.
        """
        self._share = share
        self._target = target
        self._device = device
        self._closers = contextlib.ExitStack()
        self._address: int | None = None  # of the seed's arena here, while it is open
        self._nbytes: int | None = None  # from there on, where that is known

    def open(self) -> None:
        self._opened()

    def _opened(self) -> int:
        """The address of the seed's arena here. Raises OSError if the memory can't be opened."""
        if self._address is None:
            with current_context(self._device):
                if isinstance(share := self._share, LentFile):
                    opened = cuda_virtual_memory.imported(share.fd, share.nbytes, self._device.index)
                    self._address, self._nbytes = self._closers.enter_context(opened), share.nbytes
                else:
                    opened_at = cuda_driver.open_memory(share.cuda_ipc_handle)
                    self._closers.callback(cuda_driver.close_memory, opened_at)
                    self._address = opened_at + share.offset
                    reach = cuda_driver.reach_of(opened_at)
                    self._nbytes = None if reach is None else reach - share.offset
        return self._address

    def copy(self, ops: Sequence[CopyOp], seed_is_alive: Callable[[], bool], timeout_s: float) -> float:
        """See `SeedMemory`.

        The copies run on a stream of their own, beside whatever the seed computes and other sources copy. The memory
        is closed before this returns, whatever happens.
        """
        source = self._opened()
        stop = max((op.source_offset + op.source_span_nbytes for op in ops), default=0)
        if self._nbytes is not None and stop > self._nbytes:
            self.close()
            raise OSError(f"the seed's memory has {max(0, self._nbytes)} bytes, and not the {stop} that it said")
        with current_context(self._device):
            try:
                return _copy(_join(ops), source, self._target, self._device, seed_is_alive, timeout_s)
            finally:
                self.close()

    def close(self) -> None:
        if self._address is not None:
            self._address = None
            with current_context(self._device):
                self._closers.close()


def _join(ops: Sequence[CopyOp]) -> list[CopyOp]:
    """A GPU copies any length at once."""
    return join_neighbours(sorted(ops, key=lambda op: op.target_offset))


def _copy(
    ops: Sequence[CopyOp],
    source: int,
    target: int,
    device: torch.device,
    seed_is_alive: Callable[[], bool],
    timeout_s: float,
) -> float:
    """See `CudaIpcMemory.copy`; `source` and `target` are addresses. No copy is under way any more afterwards."""
    stream = torch.cuda.Stream(device, priority=-1)  # of the pool that has no capturing ones, too
    try:
        begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record(stream)
        cuda_copies.queue_copies(ops, source, target, stream.cuda_stream)
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
