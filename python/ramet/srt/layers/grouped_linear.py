"""Owns the choice of the product of sorted rows with one matrix for each group of them: torch's, ours or in turn."""

import functools

import torch
import torch.nn.functional as F

from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.linear import project


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T with the W of each row's group. On a GPU nothing waits for the groups' sizes: a CUDA graph can hold it.

    Args:
        x: contiguous [num_rows, n], sorted by group.
        weight: contiguous [num_groups, output_size, n], in the type of x, or fp8.
        ends: int32 [num_groups], where each group's rows end. What follows the last belongs to none.
        scales: float32 [num_groups, output_size, 1] that multiply the rows of an fp8 `weight`.

    Returns:
        [num_rows, output_size] in the type of x; rows of no group hold anything, NaN too.
    """
    if not use_kernels(x):
        return multiply_in_turn(x, weight, ends, scales)
    if _torch_takes(x, weight):
        return multiply_by_torch(x, weight, ends, scales)
    from ramet.srt.layers.kernels import grouped_linear as kernel

    return kernel.grouped_linear(x, weight, ends, scales)


def multiply_in_turn(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, scales: torch.Tensor | None
) -> torch.Tensor:
    """One product for every group that has rows; fp8 weights are multiplied in the type of x."""
    y = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if start < end:
            y[start:end] = project(x[start:end], weight[group], scales=None if scales is None else scales[group])
            start = end
    return y


def multiply_by_torch(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, scales: torch.Tensor | None
) -> torch.Tensor:
    """Torch's grouped product; for fp8 weights, the rows of x are quantised and the matrix units multiply fp8."""
    if scales is None:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    from ramet.srt.layers.kernels.fp8 import quantize_rows

    values, x_scales = quantize_rows(x)
    y = torch._scaled_grouped_mm(
        values, weight.transpose(1, 2), x_scales.squeeze(1), scales.squeeze(2),
        offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return y.to(x.dtype)


def _torch_takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch has a kernel for it: elsewhere it refuses, or asks the host for the groups' sizes."""
    capability = _capability(x.device)
    if any(extent * weight.element_size() % 16 for extent in weight.shape[1:]):
        return False
    if weight.dtype == torch.float8_e4m3fn:
        return capability == (9, 0)
    return x.dtype == torch.bfloat16 and capability in ((9, 0), (10, 0))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
