"""Owns getting small things to the device and back without making the host wait, and whose context a thread is in."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

Taken = TypeVar("Taken")


def to_device(values: Sequence | np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers as a tensor on the device. The copy is queued on the current stream; the host goes on at once."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextlib.contextmanager
def current_context(device: torch.device) -> Iterator[None]:
    """Make a GPU's CUDA context the calling thread's, for calls into the driver."""
    with torch.cuda.device(device):
        torch.cuda.mem_get_info(device)  # choosing a device does not bind its context; the first runtime call does
        yield


def take_all_free(take: Callable[[], Taken]) -> Taken:
    """Take memory from the driver; if there is not enough, once more with what torch has kept of earlier allocations.

    Not before: passes would have to allocate it again, and all work waits while torch gives it back.

    Raises:
        MemoryError: if there is not enough then.
    """
    with contextlib.suppress(MemoryError):
        return take()
    torch.cuda.empty_cache()
    return take()


class HostCopies:
    """Copies of device tensors to the host that are under way."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Queue a copy; the tensor returned is not to be read before `wait`."""
        if not tensor.is_cuda:
            return tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        return copy

    def close(self, device: torch.device) -> None:
        """All copies have been queued."""
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Until all copies are there."""
        if self._event is not None:
            self._event.synchronize()
