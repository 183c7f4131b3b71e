"""Owns reading weights of four and eight bits in kernels: packed integers with scales and zeros for groups of columns
(W4A16, AWQ, GPTQ) and four-bit floats (MXFP4, NVFP4). One kernel here writes them out in a wider type.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ramet.srt.configs.weight_format import WeightFormat
from ramet.srt.layers.kernels.grouped_linear import e4m3_to_float
from ramet.srt.layers.kernels.runtime import is_interpreted

DEQUANTIZE_TILE = (32, 128, 4)  # (rows, columns, warps) of one program
INTERPRETED_TILE = (32, 64, 4)


@triton.jit
def _place(index, AWQ: tl.constexpr):
    """Where the number of that index is in a word; AutoAWQ has the rows 0, 2, 4, 6, 1, 3, 5, 7 there."""
    place = index
    if AWQ:
        place = index // 2 + index % 2 * 4
    return place


@triton.jit
def weights_tile(
    values_ptr,
    scales_ptr,
    outer_ptr,
    zeros_ptr,
    parts_ptr,
    column_groups_ptr,
    first_row,
    first,
    num_rows,
    num_columns,
    first_column,
    group_columns,
    value_row_stride,
    value_column_stride,
    scale_row_stride,
    scale_column_stride,
    zero_row_stride,
    zero_column_stride,
    NUMBERS: tl.constexpr,
    BITS: tl.constexpr,
    PACKS_ROWS: tl.constexpr,
    AWQ: tl.constexpr,
    SCALES: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_COLUMN_GROUPS: tl.constexpr,
    ZERO_ONES: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The weights of rows from `first_row` and columns from `first` on: float32 [outputs, words, columns of a word].

    Columns are counted so even where words hold rows: those of a word share a scale. See WeightFormat for the
    constants; what lies outside of the matrix is 0.
    """
    NUM: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = BLOCK_COLUMNS // NUM
    rows = first_row + tl.arange(0, BLOCK_OUTPUTS)
    word_columns = first + tl.arange(0, WORDS) * NUM
    numbers_in_word = tl.arange(0, NUM)
    mask = (rows < num_rows)[:, None] & (word_columns < num_columns)[None, :]
    if PACKS_ROWS:
        word_rows = first_row // NUM + tl.arange(0, BLOCK_OUTPUTS // NUM)
        columns = first + tl.arange(0, BLOCK_COLUMNS)
        word_mask = (word_rows * NUM < num_rows)[:, None] & (columns < num_columns)[None, :]
        word_ptrs = values_ptr + word_rows.to(tl.int64)[:, None] * value_row_stride
        words = tl.load(word_ptrs + columns[None, :] * value_column_stride, mask=word_mask, other=0)
        bits = words[:, None, :] >> (_place(numbers_in_word, AWQ) * BITS)[None, :, None]
        bits = tl.reshape(bits, (BLOCK_OUTPUTS, WORDS, NUM))
    else:
        word_ptrs = values_ptr + rows.to(tl.int64)[:, None] * value_row_stride
        words = tl.load(word_ptrs + (word_columns // NUM)[None, :] * value_column_stride, mask=mask, other=0)
        bits = words[:, :, None] >> (numbers_in_word * BITS)[None, None, :]
    bits = bits & ((1 << BITS) - 1)
    mask = mask[:, :, None]
    if HAS_COLUMN_GROUPS:
        parts = tl.load(parts_ptr + rows, mask=rows < num_rows, other=0).to(tl.int64)
        columns_of_words = word_columns[None, :, None] + numbers_in_word[None, None, :]
        group_ptrs = column_groups_ptr + (parts * num_columns)[:, None, None] + columns_of_words
        groups = tl.load(group_ptrs, mask=mask, other=0)
    else:
        groups = ((first_column + word_columns) // group_columns)[None, :, None]
    scale_ptrs = scales_ptr + (rows.to(tl.int64) * scale_row_stride)[:, None, None] + groups * scale_column_stride
    scales = tl.load(scale_ptrs, mask=mask, other=0)
    if SCALES == "exponent":
        exponents = scales.to(tl.int32)
        scales = tl.where(exponents == 0, 1 << 22, exponents << 23).to(tl.float32, bitcast=True)
    elif SCALES == "e4m3":
        scales = e4m3_to_float(scales, tl.float32)
    if OUTER != "":
        outer = tl.load(outer_ptr + rows, mask=rows < num_rows, other=1.0)[:, None, None]
        scales = scales * outer if OUTER == "times" else tl.math.div_rn(scales, outer)  # rounded as on a CPU
    if NUMBERS == "e2m1":
        # Exponent and mantissa in a float16's places, and the bias between the two.
        halves = ((bits & 7) << 9 | (bits & 8) << 12).to(tl.uint16).to(tl.float16, bitcast=True)
        numbers = halves.to(tl.float32) * 16384.0
    elif NUMBERS == "int":
        numbers = ((bits ^ (1 << (BITS - 1))) - (1 << (BITS - 1))).to(tl.float32)
    elif HAS_ZEROS:
        zero_ptrs = zeros_ptr + ((rows // NUM).to(tl.int64) * zero_row_stride)[:, None, None]
        zeros = tl.load(zero_ptrs + groups * zero_column_stride, mask=mask, other=0) + ZERO_ONES
        zeros = (zeros >> (_place(rows % NUM, AWQ) * BITS)[:, None, None]) & ((1 << BITS) - 1)
        numbers = (bits - zeros).to(tl.float32)
    else:
        numbers = (bits - (1 << (BITS - 1))).to(tl.float32)
    return numbers * scales


@triton.jit
def _dequantize_kernel(
    out_ptr,
    values_ptr,
    scales_ptr,
    outer_ptr,
    zeros_ptr,
    parts_ptr,
    column_groups_ptr,
    num_rows,
    num_columns,
    first_column,
    group_columns,
    value_row_stride,
    value_column_stride,
    scale_row_stride,
    scale_column_stride,
    zero_row_stride,
    zero_column_stride,
    NUMBERS: tl.constexpr,
    BITS: tl.constexpr,
    PACKS_ROWS: tl.constexpr,
    AWQ: tl.constexpr,
    SCALES: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_COLUMN_GROUPS: tl.constexpr,
    ZERO_ONES: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program writes BLOCK_COLUMNS columns of BLOCK_OUTPUTS rows."""
    first_row, first = tl.program_id(0) * BLOCK_OUTPUTS, tl.program_id(1) * BLOCK_COLUMNS
    weight = weights_tile(
        values_ptr,
        scales_ptr,
        outer_ptr,
        zeros_ptr,
        parts_ptr,
        column_groups_ptr,
        first_row,
        first,
        num_rows,
        num_columns,
        first_column,
        group_columns,
        value_row_stride,
        value_column_stride,
        scale_row_stride,
        scale_column_stride,
        zero_row_stride,
        zero_column_stride,
        NUMBERS,
        BITS,
        PACKS_ROWS,
        AWQ,
        SCALES,
        OUTER,
        HAS_ZEROS,
        HAS_COLUMN_GROUPS,
        ZERO_ONES,
        BLOCK_OUTPUTS,
        BLOCK_COLUMNS,
    )
    rows, columns = first_row + tl.arange(0, BLOCK_OUTPUTS), first + tl.arange(0, BLOCK_COLUMNS)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    weight = tl.reshape(weight, (BLOCK_OUTPUTS, BLOCK_COLUMNS)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, weight, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :])


class PackedArguments(NamedTuple):
    """What kernels are given of a stack of weights, in the order of `weights_tile`."""

    pointers: tuple[torch.Tensor, ...]
    sizes: tuple[int, int, int, int]
    group_strides: tuple[int, int, int, int]  # of values, scales, zeros and column groups, from matrix to matrix
    strides: tuple[int, ...]  # of the first three, from row to row and column to column
    constants: dict[str, Any]


def packed_arguments(
    tensors: Mapping[str, torch.Tensor],
    weight_format: WeightFormat,
    shape: tuple[int, int],
    first_column: int,
    parts: torch.Tensor | None,
) -> PackedArguments:
    """
    Args:
        tensors: contiguous, [num_matrices, ...], by the format's fields.
        shape: of each matrix.
        first_column: of the matrix, counted from the first one of its first group of columns.
        parts: int32 [num_rows], the row of the column groups for each row of the matrix, if there are those.
    """
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    values, scales = tensors["values"].view(torch.int32), tensors["scales"]
    scales = scales.view(torch.uint8) if scales.element_size() == 1 else scales
    zeros, column_groups = tensors.get("zeros", values), tensors.get("column_groups", values)
    outer = tensors.get("outer_scales", values)
    has_zeros = weight_format.zeros is not None
    strides = [
        _strides(values, weight_format.values.is_transposed),
        _strides(scales, weight_format.scales.is_transposed),
        _strides(zeros, weight_format.zeros is not None and weight_format.zeros.is_transposed),
    ]
    constants = {
        "NUMBERS": weight_format.numbers,
        "BITS": weight_format.bits,
        "PACKS_ROWS": weight_format.values.packs_rows,
        "AWQ": weight_format.has_awq_order,
        "SCALES": weight_format.scale_numbers,
        "OUTER": "" if weight_format.outer_scales is None else "over" if weight_format.divides else "times",
        "HAS_ZEROS": has_zeros,
        "HAS_COLUMN_GROUPS": weight_format.column_groups is not None,
        "ZERO_ONES": weight_format.ones,
    }
    return PackedArguments(
        pointers=(values, scales, outer, zeros, values if parts is None else parts, column_groups),
        sizes=(*shape, first_column, weight_format.scales.columns),
        group_strides=(strides[0][0], strides[1][0], strides[2][0], column_groups.stride(0)),
        strides=tuple(stride for _, *inner in strides for stride in inner),
        constants=constants,
    )


def _strides(tensor: torch.Tensor, is_transposed: bool) -> tuple[int, int, int]:
    """From matrix to matrix, row to row and column to column."""
    group, first, second = tensor.stride()
    return (group, second, first) if is_transposed else (group, first, second)


def dequantize_packed(packed: PackedArguments, dtype: torch.dtype) -> torch.Tensor:
    """The first matrix of a stack in `dtype`, computed in float32 and rounded once."""
    num_rows, num_columns, *_ = packed.sizes
    out = torch.empty((num_rows, num_columns), dtype=dtype, device=packed.pointers[0].device)
    outputs, columns, num_warps = INTERPRETED_TILE if is_interpreted() else DEQUANTIZE_TILE
    _dequantize_kernel[(triton.cdiv(num_rows, outputs), triton.cdiv(num_columns, columns))](
        out, *packed.pointers, *packed.sizes, *packed.strides, **packed.constants,
        BLOCK_OUTPUTS=outputs, BLOCK_COLUMNS=columns, num_warps=num_warps,
    )  # fmt: skip
    return out
