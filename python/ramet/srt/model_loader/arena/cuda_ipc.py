"""Owns a GPU's memory between processes of a host: lending it, and copying from it at the copy engine's speed."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from ramet.srt.model_loader.arena import cuda_copies
from ramet.srt.model_loader.arena.base import SeedMemory
from ramet.srt.utils import cuda_driver
from ramet.srt.weights.copy_op import CopyOp, join_neighbours

POLL_S = 0.0005


@contextlib.contextmanager
def _current_context(device: torch.device) -> Iterator[None]:
    """Make a device's CUDA context the calling thread's, for calls into the driver."""
    with torch.cuda.device(device):
        torch.cuda.mem_get_info(device)  # choosing a device does not bind its context; the first runtime call does
        yield


def lend_memory(address: int, device: torch.device) -> tuple[bytes, int]:
    """A CUDA IPC handle of the allocation around an address, and where in it the address is.

    Raises:
        OSError: if the memory can't be lent to other processes.
    """
    with _current_context(device):
        return cuda_driver.export_memory(address)


class CudaIpcMemory(SeedMemory):
    """Another process's memory. Every copy out of it ends before its call does."""

    def __init__(self, handle: bytes, offset: int, target: int, device: torch.device) -> None:
        """
        Args:
            offset: of the seed's arena in the memory that the handle opens.
            target: address of the arena that it is copied to.
            device: the GPU of that arena, which has to see the memory.
        """
        self._handle = handle
        self._offset = offset
        self._target = target
        self._device = device
        self._address: int | None = None  # while it is open

    def open(self) -> None:
        self._opened()

    def _opened(self) -> int:
        """The memory's address here. Raises OSError if it can't be opened."""
        if self._address is None:
            with _current_context(self._device):
                self._address = cuda_driver.open_memory(self._handle)
        return self._address

    def copy(self, ops: Sequence[CopyOp], seed_is_alive: Callable[[], bool], timeout_s: float) -> float:
        """See `SeedMemory`.

        The copies run on a stream of their own, beside whatever the seed computes and other sources copy. The memory
        is closed before this returns, whatever happens.
        """
        source = self._opened() + self._offset
        with _current_context(self._device):
            try:
                return _copy(_join(ops), source, self._target, self._device, seed_is_alive, timeout_s)
            finally:
                self.close()

    def close(self) -> None:
        address, self._address = self._address, None
        if address is not None:
            with _current_context(self._device):
                cuda_driver.close_memory(address)


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
