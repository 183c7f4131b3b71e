"""Owns the product of sorted rows with one matrix for each group of them, in every type that torch's does not take.

How many rows a group has is read on the GPU alone, so that a CUDA graph can hold the launch.
"""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.choices import GROUPED, Value, row_class
from ramet.srt.layers.kernels.runtime import dot_precision, is_interpreted, next_power_of_2

FEW_ROWS = 16  # of a group, on average


@triton.jit
def find_tile(ends_ptr, num_groups, BLOCK_GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The group of a program's tile of rows, num_groups if there is none, and the tile's number in it."""
    tile = tl.program_id(0)
    groups = tl.arange(0, BLOCK_GROUPS)
    ends = tl.load(ends_ptr + groups, mask=groups < num_groups, other=0)
    starts = tl.load(ends_ptr + groups - 1, mask=(groups > 0) & (groups < num_groups), other=0)
    tile_ends = tl.cumsum((ends - starts + BLOCK_ROWS - 1) // BLOCK_ROWS, axis=0)
    group = tl.sum((tile_ends <= tile).to(tl.int32), axis=0)
    return group, tile - tl.max(tl.where(tile_ends <= tile, tile_ends, 0), axis=0)


@triton.jit
def e4m3_to_float(raw, DTYPE: tl.constexpr):
    """The values of fp8 bytes: their exponent and mantissa in a float16's places, and the bias between the two.

    So it needs no conversion that older GPUs don't have. NaN becomes 480; a quantised weight is never NaN.
    """
    bits = raw.to(tl.uint16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return (bits.to(tl.float16, bitcast=True) * 256.0).to(DTYPE)


@triton.jit
def _grouped_linear_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    ends_ptr,
    out_ptr,
    row_blocks_ptr,
    num_groups,
    num_columns,
    output_size,
    num_grid_rows,
    num_grid_columns,
    block_columns,
    first_column,
    SCALES: tl.constexpr,
    HAS_ROW_BLOCKS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program makes BLOCK_OUTPUTS outputs of BLOCK_ROWS rows of one group; those too many find no group.

    SCALES is "" for a weight that is not fp8, "rows" or "blocks". Those of rows multiply the sums; those of blocks the
    weights, which are rounded to the type of x then, as they are where they are dequantised.
    """
    group, tile = find_tile(ends_ptr, num_groups, BLOCK_GROUPS, BLOCK_ROWS)
    if group >= num_groups:
        return
    start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    rows = start + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < tl.load(ends_ptr + group)
    rows = rows.to(tl.int64)
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    output_mask = outputs < output_size
    weight_rows = group.to(tl.int64) * output_size + outputs
    columns = tl.arange(0, BLOCK_COLUMNS)
    x_ptrs = x_ptr + rows[:, None] * num_columns + columns[None, :]
    weight_ptrs = weight_ptr + weight_rows[None, :] * num_columns + columns[:, None]
    if SCALES == "blocks":
        row_blocks = outputs
        if HAS_ROW_BLOCKS:
            row_blocks = tl.load(row_blocks_ptr + outputs, mask=output_mask, other=0)
        grid_rows = group.to(tl.int64) * num_grid_rows + row_blocks
        grid_ptrs = scales_ptr + grid_rows[None, :] * num_grid_columns
    acc = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for first in range(0, num_columns, BLOCK_COLUMNS):
        column_mask = first + columns < num_columns
        x = tl.load(x_ptrs + first, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
        weight = tl.load(weight_ptrs + first, mask=output_mask[None, :] & column_mask[:, None], other=0)
        if SCALES == "rows":
            weight = e4m3_to_float(weight, x.dtype)
        if SCALES == "blocks":
            grid_columns = (first_column + first + columns) // block_columns
            mask = output_mask[None, :] & column_mask[:, None]
            scales = tl.load(grid_ptrs + grid_columns[:, None], mask=mask, other=0.0)
            weight = (e4m3_to_float(weight, tl.float32) * scales).to(x.dtype)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    if SCALES == "rows":
        acc *= tl.load(scales_ptr + weight_rows, mask=output_mask, other=0.0)[None, :]
    out_ptrs = out_ptr + rows[:, None] * output_size + outputs[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & output_mask[None, :])


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    scales: torch.Tensor | None = None,
    blocks: tuple[torch.Tensor | None, int, int] | None = None,
) -> torch.Tensor:
    """See ramet.srt.layers.grouped_linear; fp8 weights are multiplied with x as it is.

    Args:
        scales: float32 of an fp8 weight: [num_groups, output_size, 1], or with `blocks` one grid for each group.
        blocks: int32 [output_size], the grid's row of each output, or None for its own; the columns of x that share a
            scale; and the first column of x, counted from the first one of the grid's first block.
    """
    (num_rows, num_columns), (num_groups, output_size, _) = x.shape, weight.shape
    assert x.is_contiguous() and weight.is_contiguous() and weight.shape[2] == num_columns
    assert (scales is not None) == (weight.dtype == torch.float8_e4m3fn)
    assert scales is None or scales.is_contiguous()
    out = torch.empty((num_rows, output_size), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    tile: Value = _tile(x.dtype, num_rows, num_groups)
    if x.element_size() == 2:
        shape = row_class(num_rows), num_groups, output_size, num_columns, weight.element_size()
        tile = GROUPED.pick(tile, *shape)
    block_rows, block_outputs, block_columns, num_warps, num_stages = tile
    num_tiles = max_tiles(num_rows, num_groups, block_rows)
    row_blocks, block_width, first_column = blocks or (None, 1, 0)
    grid = (1, 1) if scales is None else (scales.shape[1], scales.shape[2])
    _grouped_linear_kernel[(num_tiles, triton.cdiv(output_size, block_outputs))](
        x,
        weight if scales is None else weight.view(torch.uint8),
        x if scales is None else scales,
        ends,
        out,
        ends if row_blocks is None else row_blocks,
        num_groups,
        num_columns,
        output_size,
        *grid,
        block_width,
        first_column,
        SCALES="" if scales is None else "rows" if blocks is None else "blocks",
        HAS_ROW_BLOCKS=row_blocks is not None,
        BLOCK_GROUPS=max(32, next_power_of_2(num_groups)),
        BLOCK_ROWS=block_rows,
        BLOCK_OUTPUTS=block_outputs,
        BLOCK_COLUMNS=block_columns,
        PRECISION=dot_precision(x.dtype),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


def max_tiles(num_rows: int, num_groups: int, block_rows: int) -> int:
    """The most there can be: a group fills whole tiles but for its last, and at most num_rows groups have any row."""
    return (num_rows + min(num_rows, num_groups) * (block_rows - 1)) // block_rows


def _tile(dtype: torch.dtype, num_rows: int, num_groups: int) -> tuple[int, int, int, int, int]:
    """(rows, outputs, columns, warps, stages) of one program, where nothing was measured."""
    if is_interpreted():
        return 16, 32, 32, 4, 1
    has_few_rows = num_rows <= FEW_ROWS * num_groups
    if dtype == torch.float32:
        return (16, 32, 64, 4, 2) if has_few_rows else (32, 64, 32, 4, 2)
    return (16, 64, 128, 4, 4) if has_few_rows else (64, 128, 64, 4, 3)
