"""Owns the kinds of memory of an arena on a GPU: one that stays, one that can be given back, and the host's."""

import contextlib
import mmap
import os
import weakref
from abc import ABC, abstractmethod

import torch

from ramet.srt.model_loader.arena.base import LentFile, LentMemory
from ramet.srt.model_loader.arena.cuda_ipc import lend_memory
from ramet.srt.model_loader.arena.cuda_pinned import pin_memory, unpin_memory
from ramet.srt.utils import host_memory
from ramet.srt.utils.cuda_virtual_memory import VirtualMemory
from ramet.srt.utils.device import current_context, take_all_free


class CudaMemory(ABC):
    """Memory that a GPU reads and writes, at one address for good."""

    buffer: torch.Tensor  # uint8, [nbytes], of the GPU's device

    @abstractmethod
    def share(self) -> LentMemory | LentFile:
        """What another process needs to read it. Raises OSError if it can't be lent."""


class SegmentMemory(CudaMemory):
    """One segment of the caching allocator."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._device = device
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def share(self) -> LentMemory:
        return LentMemory(*lend_memory(self.buffer.data_ptr(), self._device))


class ReturnableMemory(CudaMemory):
    """Memory that can be given back and taken again, by the driver's virtual memory."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Raises MemoryError if the GPU has not so much, OSError if it has no such memory."""
        self._device = device
        with current_context(device):
            self._memory = take_all_free(lambda: VirtualMemory(nbytes, device.index))
            self.buffer = torch.as_tensor(self._memory, device=device)[:nbytes]

    def give_back(self) -> None:
        """Raises OSError if the driver refuses."""
        with current_context(self._device):
            self._memory.give_back()

    def take(self) -> None:
        """Raises MemoryError if the GPU has not so much."""
        with current_context(self._device):
            take_all_free(self._memory.take)

    def take_over(self, other: "ReturnableMemory") -> None:
        """Show what `other` has here, where there is nothing. Raises OSError if the driver refuses."""
        with current_context(self._device):
            self._memory.take_over(other._memory)

    def share(self) -> LentFile:
        with current_context(self._device):
            return LentFile(self._memory.export(), self._memory.nbytes)


class PinnedMemory(CudaMemory):
    """Host memory that is pinned, and that the GPU sees at the same address, at the speed of its bus."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Raises MemoryError if the host has not so much, or the driver does not pin it."""
        if nbytes > (available := host_memory.available_memory_nbytes()):
            raise MemoryError(
                f"{nbytes / 1e9:.2f} GB of host memory are needed, but only {available / 1e9:.2f} GB are available"
            )
        fd = host_memory.create_memfd("ramet-pinned", nbytes)
        try:
            mapping = mmap.mmap(fd, nbytes)
        finally:
            os.close(fd)
        self.host = torch.frombuffer(mapping, dtype=torch.uint8)
        if not pin_memory(self.host, device):
            raise MemoryError(f"the driver does not pin {nbytes / 1e9:.2f} GB of host memory")
        seen = _SeenByGpu(self.host)
        weakref.finalize(seen, _unpin, self.host, device).atexit = False
        self.buffer = torch.as_tensor(seen, device=device)

    def share(self) -> LentMemory:
        raise OSError("host memory that waits to become a GPU's is not lent")


class _SeenByGpu:
    """A tensor on the host as one on the GPU: pinned memory has one address (CUDA C++ guide, unified addressing).

    torch keeps it as long as any view of that.
    """

    def __init__(self, host: torch.Tensor) -> None:
        self._host = host
        self.__cuda_array_interface__ = {
            "shape": (host.nbytes,),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def _unpin(memory: torch.Tensor, device: torch.device) -> None:
    """In whatever thread."""
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize(device)
        unpin_memory(memory, device)
