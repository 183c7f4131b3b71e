"""Owns memory that begins as zeros and may be forgotten: it is given back, and taken again at the same addresses."""

import weakref

import torch

from ramet.srt.utils import host_memory
from ramet.srt.utils.cuda_virtual_memory import VirtualMemory
from ramet.srt.utils.device import current_context, take_all_free


class ReturnableZeros:
    """Memory on a GPU or the host. On the host it takes nothing where nobody has written."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """
        Raises:
            MemoryError: if the GPU has not so much.
            OSError: if it has no memory that can be given back.
        """
        self._device = device
        self._gpu: VirtualMemory | None = None
        self.is_there = True
        if device.type == "cuda":
            with current_context(device):
                self._gpu = take_all_free(lambda: VirtualMemory(nbytes, device.index))
                whole = torch.as_tensor(self._gpu, device=device)
            self.tensor = whole[:nbytes].zero_()  # uint8, [nbytes]
            return
        self._nbytes = max(1, -(-nbytes // host_memory.PAGE_BYTES)) * host_memory.PAGE_BYTES
        self._address = host_memory.reserve_addresses(self._nbytes)
        host_memory.map_nothing_at(self._address, self._nbytes)
        buffer = host_memory.view_memory(self._address, self._nbytes)
        weakref.finalize(buffer, host_memory.unmap, self._address, self._nbytes).atexit = False
        self.tensor = torch.frombuffer(buffer, dtype=torch.uint8)[:nbytes]

    def give_back(self) -> None:
        """Have no memory at the addresses. Whoever reads there nevertheless is ended, and makes no answer of it."""
        if self._gpu is not None:
            with current_context(self._device):
                self._gpu.give_back()
        else:
            host_memory.map_no_access_at(self._address, self._nbytes)
        self.is_there = False

    def take(self) -> None:
        """Have memory there again, if there is none.

        Raises:
            MemoryError: if the GPU has not so much; nothing has changed then.
        """
        if self.is_there:
            return
        if self._gpu is not None:
            with current_context(self._device):
                take_all_free(self._gpu.take)
            self.tensor.zero_()
            torch.cuda.current_stream(self._device).synchronize()  # passes run on other streams
        else:
            host_memory.map_nothing_at(self._address, self._nbytes)
        self.is_there = True
