"""Owns the product of rows with a weight matrix: which kernel or library call computes it on which device."""

import torch
import torch.nn.functional as F

from ramet.srt.layers.cpu_matmul import widening_linear, widens_weights
from ramet.srt.layers.kernels.runtime import has_fp8_units, use_kernels
from ramet.srt.layers.quantization.fp8 import dequantize, dequantize_rows
from ramet.srt.layers.quantization.scales import BlockScales, Scales

MATRIX_ALIGNMENT = 16  # rows and columns that torch._scaled_mm takes


def project(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, scales: Scales = None
) -> torch.Tensor:
    """x W^T + b for x [num_tokens, input_size] and W [output_size, input_size].

    Args:
        scales: of an fp8 `weight`: float32 [output_size, 1] that multiply its rows, or those of its blocks.
    """
    if isinstance(scales, BlockScales):
        return blockwise_linear(x, weight, scales, bias)
    if takes_gemv(x, scales):
        from ramet.srt.layers.kernels.gemv import gemv

        return gemv(x, weight, bias, scales)
    if scales is not None:
        return fp8_linear(x, weight, scales, bias)
    if widens_weights(x, weight):
        return widening_linear(x, weight, bias)
    if use_kernels(x):
        from ramet.srt.layers.kernels import few_rows

        if few_rows.takes(x, weight):
            return few_rows.few_rows_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def takes_gemv(x: torch.Tensor, scales: torch.Tensor | None) -> bool:
    """Whether a kernel of our own multiplies `x`, a single row; see `project` for the arguments."""
    if not use_kernels(x) or x.shape[0] != 1 or not x.is_contiguous():
        return False
    return scales is None or has_fp8_units(x.device)


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b. On a GPU the rows of x are quantised too, and the matrix units multiply fp8.

    Args:
        x: [num_tokens, n].
        weight: fp8 [output_size, n], contiguous.
        scales: float32 [output_size, 1].
    """
    if not (use_kernels(x) and has_fp8_units(x.device)) or any(extent % MATRIX_ALIGNMENT for extent in weight.shape):
        # Scaled before the product: its sums with numbers up to 448 can be more than float16 holds.
        return project(x, dequantize_rows(weight, scales, x.dtype), bias)
    from ramet.srt.layers.kernels.fp8 import quantize_rows as quantize_on_gpu

    values, x_scales = quantize_on_gpu(x)
    y = torch._scaled_mm(values, weight.T, x_scales, scales.T, out_dtype=torch.bfloat16, use_fast_accum=True)
    y = y.to(x.dtype)
    return y if bias is None else y + bias


def blockwise_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: BlockScales, bias: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + b with W as it is in the type of x: every product of value and scale is rounded to it, once.

    Args:
        x: [num_tokens, n].
        weight: fp8 [output_size, n], contiguous.
    """
    if not use_kernels(x):
        return project(x, dequantize(weight, scales, x.dtype), bias)
    from ramet.srt.layers.kernels.grouped_linear import grouped_linear

    ends = torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
    y = grouped_linear(x.contiguous(), weight.unsqueeze(0), ends, scales.values.unsqueeze(0), scales.blocks)
    return y if bias is None else y + bias
