"""Owns the product of sorted rows with one matrix for each group of them: whether there is one, and which."""

import functools

import torch
import torch.nn.functional as F

from ramet.srt.layers.fp8_matmul import Rows, grouped_fp8_linear, has_fp8_kernel
from ramet.srt.layers.kernels.choices import GROUPED_BY, OTHER, row_class
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.quantization.packed import fits_packed_kernel, packed_linear
from ramet.srt.layers.quantization.weight import QuantizedWeight, Weight


def can_group(dtype: torch.dtype, weight: Weight) -> bool:
    """Whether `grouped_linear` takes such a `weight` with rows of `dtype`: there is no such product on a CPU."""
    if isinstance(weight, QuantizedWeight):
        return use_kernels(weight.values) and (weight.format.numbers == "e4m3" or fits_packed_kernel(weight))
    return use_kernels(weight) or _torch_takes(dtype, weight)


def grouped_linear(x: Rows, weight: Weight, ends: torch.Tensor) -> torch.Tensor:
    """x W^T with the W of each row's group. Nothing waits for the groups' sizes: a CUDA graph can hold it.

    Args:
        x: contiguous [num_rows, n], sorted by group; see `activate_for` for those that are quantised.
        weight: contiguous [num_groups, output_size, n], in the type of x, or quantised.
        ends: int32 [num_groups], where each group's rows end. What follows the last belongs to none.

    Returns:
        [num_rows, output_size] in the type of x; rows of no group hold anything, NaN too.
    """
    if isinstance(weight, QuantizedWeight) and weight.format.has_blocks and has_fp8_kernel(weight):
        return grouped_fp8_linear(x, weight, ends)
    assert isinstance(x, torch.Tensor), "only such weights are multiplied with rows that are quantised already"
    if isinstance(weight, QuantizedWeight):
        if weight.format.numbers != "e4m3":
            return packed_linear(x, weight, ends)
        if weight.format.has_blocks:
            return multiply_as_it_is(x, weight, ends)
        values, scales = weight.values, weight.scales
    else:
        values, scales = weight, None
    if _torch_takes(x.dtype, values) and _torch_is_faster(len(x), values):
        return multiply_by_torch(x, values, ends, scales)
    from ramet.srt.layers.kernels import grouped_linear as kernel

    return kernel.grouped_linear(x, values, ends, scales)


def multiply_as_it_is(x: torch.Tensor, weight: QuantizedWeight, ends: torch.Tensor) -> torch.Tensor:
    """The same for an fp8 weight with a grid of scales, and with x in its own type."""
    from ramet.srt.layers.kernels import grouped_linear as kernel

    index = weight.layout.indices["scales"]
    return kernel.grouped_linear(x, weight.values, ends, weight.scales, (index.rows, index.columns, index.first_column))


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


def _torch_takes(dtype: torch.dtype, weight: torch.Tensor) -> bool:
    """Whether torch has a kernel for it: elsewhere it refuses, or asks the host for the groups' sizes."""
    if not weight.is_cuda or any(extent * weight.element_size() % 16 for extent in weight.shape[1:]):
        return False
    capability = _capability(weight.device)
    if weight.dtype == torch.float8_e4m3fn:
        return capability == (9, 0) and use_kernels(weight)  # which quantise the rows
    return dtype == torch.bfloat16 and capability in ((9, 0), (10, 0))


def _torch_is_faster(num_rows: int, weight: torch.Tensor) -> bool:
    """Where torch has a kernel; where nothing was measured, it is."""
    if not use_kernels(weight):
        return True
    return GROUPED_BY.pick(OTHER, row_class(num_rows), *weight.shape, weight.element_size()) == OTHER


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
