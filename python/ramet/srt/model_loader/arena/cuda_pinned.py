"""Owns pinning host memory that another process shares, so that a GPU copies out of it while the CPU goes on."""

import logging

import torch

logger = logging.getLogger(__name__)

_REGISTER_FLAGS = 1 | 2  # cudaHostRegisterPortable, for every context, and cudaHostRegisterMapped, for kernels, too


def pin_memory(memory: torch.Tensor) -> bool:
    """Pin a tensor's memory, which starts at a page, in the current device's context. False if the driver refuses."""
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _REGISTER_FLAGS)
    if int(code) != 0:
        logger.warning("%.0f MB of memory can't be pinned (CUDA error %s): copies to the GPU take longer",
                       memory.nbytes / 1e6, code)  # fmt: skip
    return int(code) == 0


def unpin_memory(memory: torch.Tensor) -> None:
    """Undo that. No copy may be under way."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
