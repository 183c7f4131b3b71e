"""Owns what every Triton kernel's launcher asks: whether kernels can run on a device, and how to launch them there."""

import functools
import importlib.util
import os

import torch

MOST_COUNTS = 1024  # of tiles that one product counts


def is_interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU (TRITON_INTERPRET=1), as in tests on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def can_run_kernels(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of `device`."""
    return has_triton() and (device.type == "cuda" or is_interpreted())


def use_kernels(x: torch.Tensor) -> bool:
    """Whether a layer takes its kernel for this input: on a GPU; the interpreter is for tests alone."""
    return x.is_cuda and has_triton()


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number under the interpreter, so that tests see several splits."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.cache
def can_launch_early(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it still runs (programmatic dependent launch, sm_90)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def has_fp8_units(device: torch.device) -> bool:
    """Whether a GPU converts and multiplies fp8 (sm_89 on)."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def counts_of_stream(device: torch.device) -> torch.Tensor:
    """int32 [MOST_COUNTS], zeros before and after each kernel that counts the programs of its tiles with them.

    What runs on one stream shares them, one after the other, in graphs too: a kernel that is launched early waits for
    the one before it first.
    """
    stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
    return _counts(device, stream)


@functools.cache
def _counts(device: torch.device, _stream: int) -> torch.Tensor:
    return torch.zeros(MOST_COUNTS, dtype=torch.int32, device=device)


def next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's input_precision: float32 products are exact there, not tf32, since callers compare with references."""
    return "ieee" if dtype == torch.float32 else "tf32"
