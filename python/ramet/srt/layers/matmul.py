"""Owns the product of rows with a weight matrix: which kernel or library call computes it on which device."""

import torch
import torch.nn.functional as F

from ramet.srt.layers.cpu_matmul import widening_linear, widens_weights
from ramet.srt.layers.grouped_linear import can_group, grouped_linear
from ramet.srt.layers.kernels.runtime import has_fp8_units, use_kernels
from ramet.srt.layers.quantization.dequantize import dequantize
from ramet.srt.layers.quantization.packed import MOST_ROWS, packed_linear, packed_row, takes_packed_row
from ramet.srt.layers.quantization.weight import QuantizedWeight, Weight

MATRIX_ALIGNMENT = 16  # rows and columns that torch._scaled_mm takes


def project(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b for x [num_tokens, input_size] and W [output_size, input_size]."""
    if takes_gemv(x, weight):
        return multiply_row(x, weight, bias)
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, bias)
    if widens_weights(x, weight):
        return widening_linear(x, weight, bias)
    if use_kernels(x):
        from ramet.srt.layers.kernels import few_rows

        if few_rows.takes(x, weight):
            return few_rows.few_rows_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def takes_gemv(x: torch.Tensor, weight: Weight) -> bool:
    """Whether a kernel of our own multiplies `x`, a single row."""
    if not use_kernels(x) or x.shape[0] != 1 or not x.is_contiguous():
        return False
    if not isinstance(weight, QuantizedWeight):
        return True
    return weight.format.multiplies_fp8 and has_fp8_units(x.device) or takes_packed_row(weight)


def multiply_row(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, activation: str = "") -> torch.Tensor:
    """x W^T + b by that kernel, or with an activation's name act(first half) * second half of it."""
    from ramet.srt.layers.kernels.gemv import gemv

    if isinstance(weight, QuantizedWeight):
        if weight.format.numbers == "uint":
            return packed_row(x, weight, bias, activation)
        return gemv(x, weight.values, bias, weight.scales, activation)
    return gemv(x, weight, bias, None, activation)


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b by the kernel that takes such a weight, or with it dequantised before the product.

    On a GPU the rows of x are quantised, too, where the format says so. Else weights are multiplied as they are in the
    type of x, each product of number and scale rounded to it once.
    """
    if takes_fp8_units(x, weight):
        return fp8_linear(x, weight.values, weight.scales, bias)
    is_packed = weight.format.numbers != "e4m3"
    if weight.format.multiplies_fp8 or not can_group(x.dtype, weight) or (is_packed and x.shape[0] > MOST_ROWS):
        # Scaled before the product: its sums with numbers up to 448 can be more than float16 holds.
        return project(x, dequantize(weight, x.dtype), bias)
    if is_packed:
        y = packed_linear(x.contiguous(), weight.as_stack(), None)
    else:
        ends = torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
        y = grouped_linear(x.contiguous(), weight.as_stack(), ends)
    return y if bias is None else y + bias


def takes_fp8_units(x: torch.Tensor, weight: QuantizedWeight) -> bool:
    """Whether the matrix units multiply fp8 with fp8."""
    if not weight.format.multiplies_fp8 or any(extent % MATRIX_ALIGNMENT for extent in weight.shape):
        return False
    return use_kernels(x) and has_fp8_units(x.device)


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b on a GPU, with the rows of x quantised.

    Args:
        x: [num_tokens, n].
        weight: fp8 [output_size, n], contiguous.
        scales: float32 [output_size, 1].
    """
    from ramet.srt.layers.kernels.fp8 import quantize_rows as quantize_on_gpu

    values, x_scales = quantize_on_gpu(x)
    y = torch._scaled_mm(values, weight.T, x_scales, scales.T, out_dtype=torch.bfloat16, use_fast_accum=True)
    y = y.to(x.dtype)
    return y if bias is None else y + bias
