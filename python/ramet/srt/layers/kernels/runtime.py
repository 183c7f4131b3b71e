"""Owns what every Triton kernel's launcher asks: whether kernels can run on a device, and how to launch them there."""

import functools
import importlib.util
import os

import torch


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
def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may have 227 KB of it, and not 99 or 163: Hopper, and Blackwell but for workstations."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


@functools.cache
def has_fp8_units(device: torch.device) -> bool:
    """Whether a GPU converts and multiplies fp8 (sm_89 on)."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's input_precision: float32 products are exact there, not tf32, since callers compare with references."""
    return "ieee" if dtype == torch.float32 else "tf32"
