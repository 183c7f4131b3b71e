"""Owns products with weights of four and eight bits, which are brought to the type of x in registers.

One kernel multiplies many rows, or those of experts, in matrix units; one a single row, bound by reading the weights.
Both know packed integers with scales and zeros for groups of columns (W4A16, AWQ, GPTQ) and four-bit floats (MXFP4,
NVFP4).
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from ramet.srt.configs.weight_format import WeightFormat
from ramet.srt.layers.kernels.grouped_linear import e4m3_to_float, find_tile, max_tiles
from ramet.srt.layers.kernels.runtime import can_launch_early, dot_precision, is_interpreted, next_power_of_2

FEW_ROWS = 16  # of a group, on average
# (rows, outputs, columns, warps, stages) of one program.
INTERPRETED_TILE = (16, 32, 32, 4, 1)
FEW_ROWS_TILE = (16, 64, 128, 4, 4)
MANY_ROWS_TILE = (64, 128, 64, 4, 3)
FLOAT32_TILE = (16, 32, 64, 4, 2)
COLUMN_GROUPS_STAGES = 2  # where each column says its group: a stage holds a scale for each number
ONE_ROW_TILE = (8, 512, 4)  # (outputs, columns, warps)
INTERPRETED_ROW_TILE = (8, 64, 4)
ONES = {4: 0x11111111, 8: 0x01010101}  # one in each number of a word


@triton.jit
def _place(index, AWQ: tl.constexpr):
    """Where the number of that index is in a word; AutoAWQ has the rows 0, 2, 4, 6, 1, 3, 5, 7 there."""
    place = index
    if AWQ:
        place = index // 2 + index % 2 * 4
    return place


@triton.jit
def _weights(
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
        scales = scales * outer if OUTER == "times" else scales / outer
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
def _grouped_kernel(
    x_ptr,
    ends_ptr,
    out_ptr,
    values_ptr,
    scales_ptr,
    outer_ptr,
    zeros_ptr,
    parts_ptr,
    column_groups_ptr,
    num_x_rows,
    num_groups,
    num_rows,
    num_columns,
    first_column,
    group_columns,
    value_stride,
    value_row_stride,
    value_column_stride,
    scale_stride,
    scale_row_stride,
    scale_column_stride,
    zero_stride,
    zero_row_stride,
    zero_column_stride,
    column_group_stride,
    NUMBERS: tl.constexpr,
    BITS: tl.constexpr,
    PACKS_ROWS: tl.constexpr,
    AWQ: tl.constexpr,
    SCALES: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_COLUMN_GROUPS: tl.constexpr,
    ZERO_ONES: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program makes BLOCK_OUTPUTS outputs of BLOCK_ROWS rows of one group; those too many find no group."""
    if HAS_GROUPS:
        group, tile = find_tile(ends_ptr, num_groups, BLOCK_GROUPS, BLOCK_ROWS)
        if group >= num_groups:
            return
        start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
        end = tl.load(ends_ptr + group)
    else:
        group, tile, start, end = 0, tl.program_id(0), 0, num_x_rows
    x_rows = start + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = (x_rows < end)[:, None]
    first_row = tl.program_id(1) * BLOCK_OUTPUTS
    columns = tl.arange(0, BLOCK_COLUMNS)
    x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    group = tl.cast(group, tl.int64)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for first in range(0, num_columns, BLOCK_COLUMNS):
        x = tl.load(x_ptrs + first, mask=row_mask & (first + columns < num_columns)[None, :], other=0.0)
        weight = _weights(
            values_ptr + group * value_stride,
            scales_ptr + group * scale_stride,
            outer_ptr + group * num_rows,
            zeros_ptr + group * zero_stride,
            parts_ptr,
            column_groups_ptr + group * column_group_stride,
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
        weight = tl.reshape(weight.to(x.dtype), (BLOCK_OUTPUTS, BLOCK_COLUMNS))
        acc = tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)
    outputs = first_row + tl.arange(0, BLOCK_OUTPUTS)
    out_ptrs = out_ptr + x_rows.to(tl.int64)[:, None] * num_rows + outputs[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=row_mask & (outputs < num_rows)[None, :])


@triton.jit
def _row_kernel(
    x_ptr,
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
    EARLY: tl.constexpr,
):
    """One program makes BLOCK_OUTPUTS outputs of the only row."""
    NUM: tl.constexpr = 32 // BITS
    first_row = tl.program_id(0) * BLOCK_OUTPUTS
    columns = tl.reshape(tl.arange(0, BLOCK_COLUMNS), (1, BLOCK_COLUMNS // NUM, NUM))
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_OUTPUTS, BLOCK_COLUMNS // NUM, NUM], tl.float32)
    for first in range(0, num_columns, BLOCK_COLUMNS):
        x = tl.load(x_ptr + first + columns, mask=first + columns < num_columns, other=0.0).to(tl.float32)
        acc += x * _weights(
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
    outputs = first_row + tl.arange(0, BLOCK_OUTPUTS)
    out = tl.sum(tl.sum(acc, axis=2), axis=1)
    tl.store(out_ptr + outputs, out.to(out_ptr.dtype.element_ty), mask=outputs < num_rows)


def packed_linear(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    weight_format: WeightFormat,
    ends: torch.Tensor | None,
    output_size: int,
    first_column: int,
    parts: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T with the W of each row's group; see ramet.srt.layers.grouped_linear, which says what is taken.

    Args:
        x: contiguous [num_rows, n].
        tensors: contiguous, [num_groups, ...], by the format's fields.
        ends: int32 [num_groups], where each group's rows end; None where all rows belong to the only one.
        first_column: of x, counted from the first one of its first group of columns.
        parts: int32 [output_size], the row of the column groups for each output, if there are those.
    """
    (num_rows, num_columns), num_groups = x.shape, len(tensors["values"])
    assert x.is_contiguous() and all(tensor.is_contiguous() for tensor in tensors.values())
    out = torch.empty((num_rows, output_size), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    values, scales = tensors["values"].view(torch.int32), tensors["scales"]
    outer, zeros = tensors.get("outer_scales", x), tensors.get("zeros", values)
    column_groups = tensors.get("column_groups", values)
    pointers = (
        values, scales.view(torch.uint8) if scales.element_size() == 1 else scales, outer, zeros,
        values if parts is None else parts, column_groups,
    )  # fmt: skip
    sizes = (output_size, num_columns, first_column, weight_format.scales.columns)
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
        "HAS_ZEROS": weight_format.zeros is not None,
        "HAS_COLUMN_GROUPS": weight_format.column_groups is not None,
        "ZERO_ONES": ONES[weight_format.bits] if weight_format.zeros_less_one else 0,
    }
    if ends is None and num_rows == 1:
        outputs, columns, num_warps = INTERPRETED_ROW_TILE if is_interpreted() else ONE_ROW_TILE
        early = can_launch_early(x.device)
        _row_kernel[(triton.cdiv(output_size, outputs),)](
            x, out, *pointers, *sizes, *(stride for _, *inner in strides for stride in inner), **constants,
            BLOCK_OUTPUTS=outputs, BLOCK_COLUMNS=columns, EARLY=early, num_warps=num_warps,
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
        return out
    rows, outputs, columns, num_warps, num_stages = _tile(x.dtype, num_rows, num_groups)
    if parts is not None:
        num_stages = min(num_stages, COLUMN_GROUPS_STAGES)
    _grouped_kernel[(max_tiles(num_rows, num_groups, rows), triton.cdiv(output_size, outputs))](
        x, values if ends is None else ends, out, *pointers, num_rows, num_groups, *sizes,
        *(stride for group in strides for stride in group), column_groups.stride(0), **constants,
        HAS_GROUPS=ends is not None, BLOCK_GROUPS=max(32, next_power_of_2(num_groups)), BLOCK_ROWS=rows,
        BLOCK_OUTPUTS=outputs, BLOCK_COLUMNS=columns, PRECISION=dot_precision(x.dtype), num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    return out


def _strides(tensor: torch.Tensor, is_transposed: bool) -> tuple[int, int, int]:
    """From group to group, row to row and column to column."""
    group, first, second = tensor.stride()
    return (group, second, first) if is_transposed else (group, first, second)


def _tile(dtype: torch.dtype, num_rows: int, num_groups: int) -> tuple[int, int, int, int, int]:
    if is_interpreted():
        return INTERPRETED_TILE
    if dtype == torch.float32:
        return FLOAT32_TILE
    return FEW_ROWS_TILE if num_rows <= FEW_ROWS * num_groups else MANY_ROWS_TILE
