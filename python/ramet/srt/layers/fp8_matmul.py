"""Owns products of quantised rows with fp8 weights on a GPU: which weights its fp8 units take, and how.

The scales of a weight are of rows, or of blocks; those of activations then of rows, or of as many columns.
"""

import functools

import torch

from ramet.srt.layers.kernels.runtime import has_fp8_units, use_kernels
from ramet.srt.layers.quantization.weight import QuantizedWeight

MATRIX_ALIGNMENT = 16  # rows and columns that torch._scaled_mm takes
BLOCK = 128  # rows and columns of the blocks that the kernels and torch know
TORCH_ROWS = 96  # from so many on, torch's product of blocks is the faster one, measured on an H200


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
    from ramet.srt.layers.kernels.gemv import BlockScales, gemv

    has_blocks = weight.format.has_blocks
    scales = BlockScales(weight.scales, *_row_blocks(weight)) if has_blocks else weight.scales
    return gemv(x, weight.values, bias, scales, activation)


def fp8_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b with the rows of x quantised; see `has_fp8_kernel`.

    Args:
        x: [num_tokens, n].
    """
    y = _multiply_blocks(x, weight) if weight.format.has_blocks else _multiply_rows(x, weight)
    y = y.to(x.dtype)
    return y if bias is None else y + bias


def takes_rows(weight: QuantizedWeight) -> bool:
    """Whether `fp8_linear` takes a matrix: torch's product of scaled rows wants whole units."""
    return weight.format.has_blocks or not any(extent % MATRIX_ALIGNMENT for extent in weight.shape)


def grouped_fp8_linear(x: torch.Tensor, weight: QuantizedWeight, ends: torch.Tensor) -> torch.Tensor:
    """x W^T with the W of each row's group, for scales of blocks; see ramet.srt.layers.grouped_linear."""
    from ramet.srt.layers.kernels.fp8_blocks import blocks_linear, quantize_groups

    return blocks_linear(*quantize_groups(x), weight.values, weight.scales, *_row_blocks(weight), ends, x.dtype)


def _multiply_rows(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    from ramet.srt.layers.kernels.fp8 import quantize_rows

    values, x_scales = quantize_rows(x)
    return torch._scaled_mm(
        values, weight.values.T, x_scales, weight.scales.T, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _multiply_blocks(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    from ramet.srt.layers.kernels.fp8_blocks import blocks_linear, quantize_groups

    values, x_scales = quantize_groups(x)
    if len(x) >= TORCH_ROWS and _torch_takes(len(x), weight):
        return torch._scaled_mm(values, weight.values.T, x_scales, weight.scales.T, out_dtype=torch.bfloat16)
    stack = weight.as_stack()
    return blocks_linear(values, x_scales, stack.values, stack.scales, *_row_blocks(weight), None, x.dtype)


def _torch_takes(num_rows: int, weight: QuantizedWeight) -> bool:
    """Whether torch has a product for such rows and blocks: on Hopper alone, and of whole blocks."""
    num_outputs, num_columns = weight.shape
    is_whole = num_rows % 4 == 0 and num_outputs % BLOCK == 0 and num_columns % (4 * BLOCK) == 0
    index = weight.layout.indices["scales"]
    return is_whole and index.is_regular and weight.format.scales.rows == BLOCK and _has_torch_blocks(weight.device)


@functools.cache
def _has_torch_blocks(device: torch.device) -> bool:
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return torch.cuda.get_device_capability(device) == (9, 0) and version >= (12, 9)


def _row_blocks(weight: QuantizedWeight) -> tuple[torch.Tensor | None, int]:
    """The grid's row of each row of the matrix, or None where as many as are said share one."""
    index = weight.layout.indices["scales"]
    return None if index.is_regular else index.rows, weight.format.scales.rows
