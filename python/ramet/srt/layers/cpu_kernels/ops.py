"""Owns the calls of the kernels for CPUs: which tensors they take, and what they give."""

import torch

from ramet.srt.layers.cpu_kernels.library import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}


def use_cpu_kernels(x: torch.Tensor) -> bool:
    """Whether a layer takes its kernel for this input."""
    return library() is not None and x.device.type == "cpu" and x.dtype in DTYPES


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, summed in float32, for x [num_rows, input_size] and W [output_size, input_size] of its type."""
    kernels = library()
    assert kernels is not None
    x = x.contiguous()
    (num_rows, input_size), output_size = x.shape, weight.shape[0]
    y = torch.empty((num_rows, output_size), dtype=x.dtype)
    bias_address = None if bias is None else bias.data_ptr()
    addresses = x.data_ptr(), weight.data_ptr(), bias_address, y.data_ptr()
    kernels.ramet_linear(DTYPES[x.dtype], *addresses, num_rows, output_size, input_size)
    return y
