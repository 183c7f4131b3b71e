"""Owns the product of rows with a weight matrix: which kernel or library call computes it on which device."""

import torch
import torch.nn.functional as F

from ramet.srt.layers.cpu_kernels.ops import linear as cpu_linear
from ramet.srt.layers.cpu_kernels.ops import use_cpu_kernels
from ramet.srt.layers.cpu_matmul import MOST_CPU_ROWS, lacks_instructions, widening_linear, widens_weights
from ramet.srt.layers.fp8_matmul import (
    QuantizedRows,
    Rows,
    fp8_linear,
    has_fp8_kernel,
    multiply_row_in_fp8,
    scales_of,
    takes_rows,
)
from ramet.srt.layers.grouped_linear import can_group, multiply_as_it_is
from ramet.srt.layers.kernels.choices import EXPERTS_BY, OTHER, OURS, row_class
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.quantization.dequantize import dequantize
from ramet.srt.layers.quantization.packed import (
    multiplies_words,
    packed_row,
    packed_row_by_experts,
    packed_rows,
    takes_packed_experts,
    takes_packed_row,
)
from ramet.srt.layers.quantization.stored import stored_linear, takes_stored
from ramet.srt.layers.quantization.weight import QuantizedWeight, Weight

MOST_ASSIGNMENTS = 256  # of tokens to experts that are multiplied one by one, whatever was measured


def project(x: Rows, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b for x [num_tokens, input_size] and W [output_size, input_size]."""
    if isinstance(x, QuantizedRows):
        assert isinstance(weight, QuantizedWeight)
        return fp8_linear(x, weight, bias)
    if takes_gemv(x, weight):
        return multiply_row(x, weight, bias)
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, bias)
    if takes_cpu_kernel(x, weight, bias):
        return cpu_linear(x, weight, bias)
    if widens_weights(x, weight):
        return widening_linear(x, weight, bias)
    if use_kernels(x):
        from ramet.srt.layers.kernels import few_rows

        if few_rows.takes(x, weight):
            return few_rows.few_rows_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def takes_cpu_kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether Ramet's kernel for CPUs multiplies: a few rows, for which memory is the limit, or without instructions.

    Many rows go to PyTorch's library where the processor multiplies their type (bfloat16 by AVX-512 or AMX, float16).
    """
    if not use_cpu_kernels(x, weight, bias) or weight.dim() != 2:
        return False
    return x.shape[0] <= MOST_CPU_ROWS or (x.dtype != torch.float32 and lacks_instructions(x.dtype))


def takes_gemv(x: torch.Tensor, weight: Weight) -> bool:
    """Whether a kernel of our own multiplies `x`, a single row."""
    if not _is_row_on_gpu(x):
        return False
    return not isinstance(weight, QuantizedWeight) or has_fp8_kernel(weight) or takes_packed_row(weight)


def multiply_row(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, activation: str = "") -> torch.Tensor:
    """x W^T + b by that kernel, or with an activation's name act(first half) * second half of it."""
    if isinstance(weight, QuantizedWeight):
        multiply = multiply_row_in_fp8 if weight.format.numbers == "e4m3" else packed_row
        return multiply(x, weight, bias, activation)
    from ramet.srt.layers.kernels.gemv import gemv

    return gemv(x, weight, bias, None, activation)


def takes_experts_gemv(x: torch.Tensor, weight: Weight, num_assignments: int) -> bool:
    """Whether a kernel for single rows multiplies those of x with the matrices of a stack that their tokens go to.

    Each matrix is read once for each assignment to it: where nothing was measured, that is for one token alone.
    """
    if not use_kernels(x) or not x.is_contiguous() or not 0 < num_assignments <= MOST_ASSIGNMENTS:
        return False
    if isinstance(weight, QuantizedWeight) and not has_fp8_kernel(weight) and not takes_packed_experts(weight):
        return False
    bits = weight.format.bits if isinstance(weight, QuantizedWeight) else 8 * weight.element_size()
    default = OURS if len(x) == 1 else OTHER
    return EXPERTS_BY.pick(default, row_class(num_assignments), *weight.shape, bits) == OURS


def _is_row_on_gpu(x: torch.Tensor) -> bool:
    return use_kernels(x) and x.shape[0] == 1 and x.is_contiguous()


def multiply_row_by_experts(
    x: torch.Tensor, weight: Weight, ids: torch.Tensor, first_expert: int, activation: str = ""
) -> torch.Tensor:
    """x W^T, or act(first half) * second half of it, with the W of each expert that a token goes to.

    Args:
        x: contiguous, [num_ids, n], or a row for each run of as many ids.
        weight: [num_experts, output_size, n], one that `takes_experts_gemv` takes.
        ids: contiguous integers [num_ids]; those outside of num_experts from `first_expert` on give zeros.
    """
    from ramet.srt.layers.kernels.gemv import Experts, gemv

    experts = Experts(ids, first_expert)
    if not isinstance(weight, QuantizedWeight):
        return gemv(x, weight, None, None, activation, experts=experts)
    if weight.format.numbers != "e4m3":
        return packed_row_by_experts(x, weight, experts, activation)
    return gemv(x, weight.values, None, scales_of(weight), activation, experts=experts)


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b by the kernel that takes such a weight, or with it dequantised before the product.

    On a GPU the rows of x are quantised, too, where the format says so. Else weights are multiplied as they are in the
    type of x, each product of number and scale rounded to it once; by the kernels for CPUs in float32.
    """
    if takes_stored(x, weight, bias):
        return stored_linear(x, weight, bias)
    if has_fp8_kernel(weight) and takes_rows(weight):
        return fp8_linear(x, weight, bias)
    is_packed = weight.format.numbers != "e4m3"
    has_row_scales = weight.format.multiplies_fp8 and not weight.format.has_blocks
    if has_row_scales or not can_group(x.dtype, weight) or (is_packed and not multiplies_words(x.shape[0], weight)):
        # Scaled before the product: its sums with numbers up to 448 can be more than float16 holds.
        return project(x, dequantize(weight, x.dtype), bias)
    if is_packed:
        return packed_rows(x.contiguous(), weight, bias)
    ends = torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
    y = multiply_as_it_is(x.contiguous(), weight.as_stack(), ends)
    return y if bias is None else y + bias
