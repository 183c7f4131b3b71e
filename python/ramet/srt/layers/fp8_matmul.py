"""Owns products of quantised rows with fp8 weights on a GPU: which weights its fp8 units take, and how.

The scales of a weight are of rows, or of blocks; those of activations then of rows, or of as many columns.
"""

import functools
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from ramet.srt.layers.activation import Activation, act_and_mul
from ramet.srt.layers.kernels.choices import FP8_BLOCKS_BY, OTHER, OURS, row_class
from ramet.srt.layers.kernels.runtime import has_fp8_units, use_kernels
from ramet.srt.layers.quantization.weight import QuantizedWeight, Weight

if TYPE_CHECKING:
    from ramet.srt.layers.kernels.gemv import BlockScales

MATRIX_ALIGNMENT = 16  # rows and columns that torch._scaled_mm takes
BLOCK = 128  # rows and columns of the blocks that the kernels and torch know
TORCH_ROWS = 96  # from so many on, torch's product of blocks is the faster one on an H200, where nothing was measured


def has_fp8_kernel(weight: QuantizedWeight) -> bool:
    """Whether kernels multiply rows with such a matrix or stack in fp8, on the device where it is."""
    if not weight.format.multiplies_fp8 or not use_kernels(weight.values) or not has_fp8_units(weight.device):
        return False
    index = weight.layout.indices["scales"]
    return not weight.format.has_blocks or (index.columns == BLOCK and index.first_column == 0)


def multiply_row_in_fp8(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, activation: str = ""
) -> torch.Tensor:
    """x W^T + b, or act(first half) * second half of it, for a single row; see `has_fp8_kernel`.

    The row keeps its type: quantising it would gain nothing, since the weights are what must be read.
    """
    from ramet.srt.layers.kernels.gemv import gemv

    return gemv(x, weight.values, bias, scales_of(weight), activation)


def scales_of(weight: QuantizedWeight) -> "torch.Tensor | BlockScales":
    """As the kernel for a single row takes them."""
    from ramet.srt.layers.kernels.gemv import BlockScales

    return BlockScales(weight.scales, *_row_blocks(weight)) if weight.format.has_blocks else weight.scales


class QuantizedRows(NamedTuple):
    """Activations in fp8, [num_tokens, n], with a float32 scale for each 128 columns of a row."""

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype  # of what they stand for


Rows: TypeAlias = torch.Tensor | QuantizedRows


def activate_for(x: torch.Tensor, activation: Activation, weight: Weight) -> Rows:
    """activation(first half) * second half of x, quantised at once where the product with `weight` would do it.

    Args:
        x: [num_tokens, 2 * n].
        weight: what multiplies the result: one matrix, or those of experts.
    """
    if not isinstance(weight, QuantizedWeight) or not weight.format.has_blocks or not has_fp8_kernel(weight):
        return act_and_mul(x, activation)
    if len(weight.shape) == 2 and x.shape[0] == 1:  # a single row keeps its type
        return act_and_mul(x, activation)
    from ramet.srt.layers.kernels.fp8_blocks import quantize_groups

    return QuantizedRows(*quantize_groups(x, activation.name), x.dtype)


def fp8_linear(x: Rows, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b with the rows of x quantised; see `has_fp8_kernel`.

    Args:
        x: [num_tokens, n].
    """
    if weight.format.has_blocks:
        y = _multiply_blocks(_quantized(x), weight)
    else:
        assert isinstance(x, torch.Tensor)
        y = _multiply_rows(x, weight)
    y = y.to(x.dtype)
    return y if bias is None else y + bias


def takes_rows(weight: QuantizedWeight) -> bool:
    """Whether `fp8_linear` takes a matrix: torch's product of scaled rows wants whole units."""
    return weight.format.has_blocks or not any(extent % MATRIX_ALIGNMENT for extent in weight.shape)


def grouped_fp8_linear(x: Rows, weight: QuantizedWeight, ends: torch.Tensor) -> torch.Tensor:
    """x W^T with the W of each row's group, for scales of blocks; see ramet.srt.layers.grouped_linear."""
    from ramet.srt.layers.kernels.fp8_blocks import blocks_linear

    values, scales, dtype = _quantized(x)
    return blocks_linear(values, scales, weight.values, weight.scales, *_row_blocks(weight), ends, dtype)


def _quantized(x: Rows) -> QuantizedRows:
    if isinstance(x, QuantizedRows):
        return x
    from ramet.srt.layers.kernels.fp8_blocks import quantize_groups

    return QuantizedRows(*quantize_groups(x), x.dtype)


def _multiply_rows(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    from ramet.srt.layers.kernels.fp8 import quantize_rows

    values, x_scales = quantize_rows(x)
    return torch._scaled_mm(
        values, weight.values.T, x_scales, weight.scales.T, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _multiply_blocks(x: QuantizedRows, weight: QuantizedWeight) -> torch.Tensor:
    from ramet.srt.layers.kernels.fp8_blocks import blocks_linear

    num_rows = x.values.shape[0]
    if _torch_takes(num_rows, weight) and _torch_is_faster(num_rows, weight):
        return torch._scaled_mm(x.values, weight.values.T, x.scales, weight.scales.T, out_dtype=torch.bfloat16)
    stack = weight.as_stack()
    return blocks_linear(x.values, x.scales, stack.values, stack.scales, *_row_blocks(weight), None, x.dtype)


def _torch_takes(num_rows: int, weight: QuantizedWeight) -> bool:
    """Whether torch has a product for such rows and blocks: on Hopper alone, and of whole blocks."""
    num_outputs, num_columns = weight.shape
    is_whole = num_rows % 4 == 0 and num_outputs % BLOCK == 0 and num_columns % (4 * BLOCK) == 0
    index = weight.layout.indices["scales"]
    return is_whole and index.is_regular and weight.format.scales.rows == BLOCK and _has_torch_blocks(weight.device)


def _torch_is_faster(num_rows: int, weight: QuantizedWeight) -> bool:
    default = OTHER if num_rows >= TORCH_ROWS else OURS
    return FP8_BLOCKS_BY.pick(default, row_class(num_rows), *weight.shape) == OTHER


@functools.cache
def _has_torch_blocks(device: torch.device) -> bool:
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return torch.cuda.get_device_capability(device) == (9, 0) and version >= (12, 9)


def _row_blocks(weight: QuantizedWeight) -> tuple[torch.Tensor | None, int]:
    """The grid's row of each row of the matrix, or None where as many as are said share one."""
    index = weight.layout.indices["scales"]
    return None if index.is_regular else index.rows, weight.format.scales.rows
