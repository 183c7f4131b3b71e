"""Owns the choice of the device that a rank runs on, and how much of its memory is free."""

import logging
import os

import psutil
import torch

from ramet.srt.errors import one_line

logger = logging.getLogger(__name__)

DRIVER_DEVICE = "/dev/nvidiactl"  # there where NVIDIA's driver is loaded


def pick_device(name: str, gpu_id: int) -> torch.device:
    """The device for --device `name`: "cpu", "cuda", or "auto" for a GPU where there is one.

    Args:
        gpu_id: number of the GPU that the rank takes, if it takes one; each has its own.

    Raises:
        ValueError: if a GPU is asked for and can't be used; the message says why.
    """
    if name == "auto" and not torch.cuda.is_available():
        _say_why_not_the_gpu()
        return torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    _start_cuda()
    count = torch.cuda.device_count()
    if gpu_id >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        limit = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        raise ValueError(f"there is no GPU {gpu_id} for a rank of this host: there are {count}{limit}")
    device = torch.device("cuda", gpu_id)
    try:
        torch.cuda.set_device(device)  # of CUDA 12 on, this makes the context of any GPU but the first
        torch.empty(1, device=device)
    except RuntimeError as error:  # no memory left for as much as a context, or a GPU that others may not use
        raise ValueError(f"GPU {gpu_id} can't be used: {one_line(error)}") from error
    return device


def _start_cuda() -> None:
    """Raises ValueError if there is no CUDA, or no device for it."""
    if not torch.backends.cuda.is_built():
        raise ValueError(f"--device cuda needs a torch with CUDA; this is {torch.__version__}")
    try:
        torch.cuda.init()
    except RuntimeError as error:  # no driver, one too old for this torch, no device
        raise ValueError(f"--device cuda: {one_line(error)}") from error


def _say_why_not_the_gpu() -> None:
    """Where there is a GPU, the CPU is not taken in silence: it is a hundred times slower."""
    if not os.path.exists(DRIVER_DEVICE) or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    try:
        _start_cuda()
    except ValueError as error:
        logger.warning("this host has an NVIDIA driver, but the model runs on the CPU: %s", error)


def free_memory_nbytes(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
