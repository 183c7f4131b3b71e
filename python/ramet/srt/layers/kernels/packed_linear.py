"""Owns products with weights of four and eight bits, which are brought to the type of x in registers.

One kernel multiplies few and many rows, or those of experts, in matrix units. How weights are read is in
packed_weights.py; packed_gemv.py, packed_row.py and awq_rows.py multiply few rows with most of them.
"""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.choices import PACKED, Value, row_class
from ramet.srt.layers.kernels.grouped_linear import find_tile, max_tiles
from ramet.srt.layers.kernels.packed_weights import PackedArguments, weights_tile
from ramet.srt.layers.kernels.runtime import dot_precision, is_interpreted, next_power_of_2

FEW_ROWS = 16  # of a group, on average
# (rows, outputs, columns, warps, stages) of one program.
INTERPRETED_TILE = (16, 32, 32, 4, 1)
FEW_ROWS_TILE = (16, 64, 128, 4, 4)
MANY_ROWS_TILE = (64, 128, 64, 4, 3)
FLOAT32_TILE = (16, 32, 64, 4, 2)
COLUMN_GROUPS_STAGES = 2  # where each column says its group: a stage holds a scale for each number


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
    scale_stride,
    zero_stride,
    column_group_stride,
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
        group = 0
        tile = tl.program_id(0)
        start = 0
        end = num_x_rows
    x_rows = start + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = (x_rows < end)[:, None]
    first_row = tl.program_id(1) * BLOCK_OUTPUTS
    columns = tl.arange(0, BLOCK_COLUMNS)
    x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    group = tl.cast(group, tl.int64)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for first in range(0, num_columns, BLOCK_COLUMNS):
        x = tl.load(x_ptrs + first, mask=row_mask & (first + columns < num_columns)[None, :], other=0.0)
        weight = weights_tile(
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


def packed_linear(x: torch.Tensor, packed: PackedArguments, ends: torch.Tensor | None) -> torch.Tensor:
    """x W^T with the W of each row's group; see ramet.srt.layers.grouped_linear.

    Args:
        x: contiguous [num_rows, n].
        packed: the stack of weights.
        ends: int32 [num_groups], where each group's rows end; None where all rows belong to the only one.
    """
    num_rows, output_size, num_groups = x.shape[0], packed.sizes[0], len(packed.pointers[0])
    assert x.is_contiguous() and x.shape[1] == packed.sizes[1]
    out = torch.empty((num_rows, output_size), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    tile: Value = _tile(x.dtype, num_rows, num_groups)
    if x.element_size() == 2:
        bits = packed.constants["BITS"]
        tile = PACKED.pick(tile, row_class(num_rows), num_groups, output_size, x.shape[1], bits)
    rows, outputs, columns, num_warps, num_stages = tile
    if packed.constants["HAS_COLUMN_GROUPS"]:
        num_stages = min(num_stages, COLUMN_GROUPS_STAGES)
    _grouped_kernel[(max_tiles(num_rows, num_groups, rows), triton.cdiv(output_size, outputs))](
        x, packed.pointers[0] if ends is None else ends, out, *packed.pointers, num_rows, num_groups, *packed.sizes,
        *packed.group_strides, *packed.strides, **packed.constants, HAS_GROUPS=ends is not None,
        BLOCK_GROUPS=max(32, next_power_of_2(num_groups)), BLOCK_ROWS=rows, BLOCK_OUTPUTS=outputs,
        BLOCK_COLUMNS=columns, PRECISION=dot_precision(x.dtype), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def _tile(dtype: torch.dtype, num_rows: int, num_groups: int) -> tuple[int, int, int, int, int]:
    if is_interpreted():
        return INTERPRETED_TILE
    if dtype == torch.float32:
        return FLOAT32_TILE
    return FEW_ROWS_TILE if num_rows <= FEW_ROWS * num_groups else MANY_ROWS_TILE
