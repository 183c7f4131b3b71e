"""Owns pinning host memory that another process shares, so that a GPU copies out of it while the CPU goes on."""

import contextlib
import logging

import torch

from ramet.srt.utils.cuda_driver import call_driver
from ramet.srt.utils.device import current_context

logger = logging.getLogger(__name__)

# CU_MEMHOSTREGISTER_PORTABLE, for every context, and CU_MEMHOSTREGISTER_DEVICEMAP, for kernels, too
_REGISTER_FLAGS = 1 | 2


def pin_memory(memory: torch.Tensor, device: torch.device) -> bool:
    """Pin a tensor's memory, which starts at a page. False if the driver refuses.

    The driver is asked itself: a refusal of the runtime's is met again by the thread's next kernel, as its error.
    """
    try:
        with current_context(device):
            call_driver("cuMemHostRegister_v2", memory.data_ptr(), memory.nbytes, _REGISTER_FLAGS)
    except OSError as error:
        logger.warning("%.0f MB of memory can't be pinned (%s): copies to the GPU take longer",
                       memory.nbytes / 1e6, error)  # fmt: skip
        return False
    return True


def unpin_memory(memory: torch.Tensor, device: torch.device) -> None:
    """Undo that. No copy may be under way. What the driver says to that changes nothing."""
    with contextlib.suppress(OSError), current_context(device):
        call_driver("cuMemHostUnregister", memory.data_ptr())
