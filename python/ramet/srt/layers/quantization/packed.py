"""Owns the use of the kernels for words of numbers: which weights they take, and what they are given of them."""

import functools
import logging
from typing import TYPE_CHECKING

import torch

from ramet.srt.configs.weight_format import WHOLE
from ramet.srt.layers.kernels.choices import OTHER, OURS, PACKED_BY, row_class
from ramet.srt.layers.kernels.runtime import is_interpreted
from ramet.srt.layers.quantization.weight import QuantizedWeight
from ramet.srt.layers.row_sums import GatedSums, UnfinishedRow, UnscaledRow

if TYPE_CHECKING:
    from ramet.srt.layers.kernels.gemv import Experts
    from ramet.srt.layers.kernels.packed_weights import PackedArguments

logger = logging.getLogger(__name__)

MOST_TRANSPOSED_ROWS = 16  # that are multiplied from words where nothing was measured; see `multiplies_words`
MOST_CHOSEN_ROWS = 128  # beyond that a matrix is dequantised, whatever was measured
MOST_NUMBERS = (1 << 31) - 1  # of a matrix, for kernels that count them in 32 bits


def fits_packed_kernel(weight: QuantizedWeight) -> bool:
    """Whether the kernels take a matrix or stack.

    The columns of a word must share a scale, or say each which one they have.
    """
    index, num = weight.layout.indices["scales"], 32 // weight.format.bits
    if weight.format.numbers == "e4m3" or weight.layout.num_columns % num:
        return False
    if weight.format.column_groups is not None or index.columns == WHOLE:
        return True
    return index.columns % num == index.first_column % num == 0


def multiplies_words(num_rows: int, weight: QuantizedWeight) -> bool:
    """Whether multiplying words with so many rows is faster than dequantising the matrix for a library's product.

    What it is where nothing was measured comes from an H200 and matrices of an 8 B model.
    """
    most, most_chosen = MOST_TRANSPOSED_ROWS, MOST_CHOSEN_ROWS
    if not weight.format.values.is_transposed:
        most = 1
    elif weight.format.has_awq_order and takes_packed_row(weight):
        from ramet.srt.layers.kernels.awq_rows import MAX_ROWS

        most = most_chosen = MAX_ROWS
    if num_rows == 1 or num_rows > most_chosen:
        return num_rows == 1
    default = OURS if num_rows <= most else OTHER
    return PACKED_BY.pick(default, row_class(num_rows), *weight.shape, weight.format.bits) == OURS


def packed_rows(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b for a few rows."""
    if weight.format.has_awq_order and takes_packed_row(weight):
        from ramet.srt.layers.kernels.awq_rows import awq_rows

        return awq_rows(x, _arguments(weight.as_stack()), bias)
    y = packed_linear(x, weight.as_stack(), None)
    return y if bias is None else y + bias


def packed_linear(x: torch.Tensor, weight: QuantizedWeight, ends: torch.Tensor | None) -> torch.Tensor:
    """x W^T with the W of each row's group, of a stack; see `grouped_linear`. Without `ends`, all rows are in one."""
    from ramet.srt.layers.kernels.packed_linear import packed_linear

    return packed_linear(x, _arguments(weight), ends)


def takes_packed_row(weight: QuantizedWeight) -> bool:
    """Whether a kernel of its own multiplies a single row with a matrix, or with those of a stack."""
    weight_format, (num_rows, num_columns) = weight.format, weight.shape[-2:]
    if weight_format.column_groups is not None or not fits_packed_kernel(weight):
        return False
    if not weight_format.values.is_transposed:
        return _has_whole_groups(weight) and num_rows * num_columns <= MOST_NUMBERS
    if weight_format.zeros is None:
        return False
    has_halves = num_rows % (2 * 32 // weight_format.bits) == 0  # of whole words, as gate and up are
    return has_halves and num_rows * num_columns <= MOST_NUMBERS


def packed_row(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """x W^T + b for a single row, or with an activation's name act(first half) * second half of it."""
    arguments = _arguments(weight.as_stack())
    if not weight.format.values.is_transposed:
        from ramet.srt.layers.kernels.packed_gemv import packed_gemv

        return packed_gemv(x, arguments, bias, activation)
    if weight.format.has_awq_order:
        if _has_gluon():
            from ramet.srt.layers.kernels.awq_row import awq_row, takes_awq_row

            if len(x) == 1 and takes_awq_row(x.dtype, x.device, arguments, activation):
                return awq_row(x, arguments, bias, activation)
        from ramet.srt.layers.kernels.awq_rows import awq_rows

        return awq_rows(x, arguments, bias, activation)
    from ramet.srt.layers.kernels.packed_row import packed_row

    return packed_row(x, arguments, bias, activation)


def leaves_row_sums(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Whether a kernel multiplies a row of `dtype` and leaves its sums to who reads them."""
    if not weight.format.has_awq_order or not takes_packed_row(weight) or not _has_gluon():
        return False
    from ramet.srt.layers.kernels.awq_row import takes_awq_row

    return takes_awq_row(dtype, weight.device, _arguments(weight.as_stack()))


def packed_row_sums(x: UnfinishedRow, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """The sums of x W^T + b, float32 [num_parts, num_outputs], by that kernel."""
    from ramet.srt.layers.kernels.awq_row import Input, awq_row_sums

    arguments = _arguments(weight.as_stack())
    if isinstance(x, UnscaledRow):
        return awq_row_sums(Input(x.values, squares=x.squares, eps=x.eps), arguments, bias)
    if isinstance(x, GatedSums):
        return awq_row_sums(Input(x.row.parts, activation=x.activation.name), arguments, bias)
    return awq_row_sums(Input(x), arguments, bias)


@functools.cache
def _has_gluon() -> bool:
    """Whether kernels in Gluon run here: no interpreter has it, and Triton may change what is experimental."""
    if is_interpreted():
        return False
    try:
        import ramet.srt.layers.kernels.awq_row  # noqa: F401
    except (ImportError, AttributeError) as error:
        logger.warning("Triton's Gluon is another one than this version knows: slower kernels are taken. %s", error)
        return False
    return True


def takes_packed_experts(weight: QuantizedWeight) -> bool:
    """Whether a kernel multiplies single rows each with its matrix of a stack, as those of experts. AWQ has none."""
    return not weight.format.has_awq_order and takes_packed_row(weight)


def packed_row_by_experts(
    x: torch.Tensor, weight: QuantizedWeight, experts: "Experts", activation: str
) -> torch.Tensor:
    """x W^T with the W of each expert, or with an activation's name act(first half) * second half of it."""
    if weight.format.values.is_transposed:
        from ramet.srt.layers.kernels.packed_row import packed_row

        return packed_row(x, _arguments(weight), None, activation, experts)
    from ramet.srt.layers.kernels.packed_gemv import packed_gemv

    return packed_gemv(x, _arguments(weight), None, activation, experts=experts)


def _has_whole_groups(weight: QuantizedWeight) -> bool:
    """Whether scales are of groups of words from the first one on, as the kernel for a single row takes them."""
    from ramet.srt.layers.kernels.packed_gemv import takes_group

    index = weight.layout.indices["scales"]
    return takes_group(index.columns, weight.format.bits) and index.first_column == 0


def packed_dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """A matrix in `dtype`."""
    from ramet.srt.layers.kernels.packed_weights import dequantize_packed

    return dequantize_packed(_arguments(weight.as_stack()), dtype)


def _arguments(weight: QuantizedWeight) -> "PackedArguments":
    from ramet.srt.layers.kernels.packed_weights import packed_arguments

    layout = weight.layout
    parts = None if weight.format.column_groups is None else layout.indices["column_groups"].rows
    shape = (layout.num_rows, layout.num_columns)
    return packed_arguments(weight.tensors, weight.format, shape, layout.indices["scales"].first_column, parts)
