"""Owns the product of one row with a weight matrix: a decode pass of one request, bound by reading the weights."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.activation import activate
from ramet.srt.layers.kernels.choices import GEMV
from ramet.srt.layers.kernels.runtime import can_launch_early, is_interpreted


class Tile(NamedTuple):
    """What one program multiplies at a time."""

    rows: int  # with an activation, as many of the other half, too
    columns: int
    num_warps: int


# Measured on an H200.
TILE, GATED_TILE = Tile(4, 1024, 8), Tile(1, 1024, 4)
FP8_TILE, GATED_FP8_TILE = Tile(4, 1024, 2), Tile(2, 1024, 2)
INTERPRETED_COLUMNS = 128
GROUP_COLUMNS = 128  # that share one of the scales of blocks


class BlockScales(NamedTuple):
    """The scales of an fp8 weight that has one for each block of so many rows and 128 columns."""

    values: torch.Tensor  # float32 [grid rows, ceil(num_columns / 128)], contiguous
    rows: torch.Tensor | None  # int32 [num_rows], the grid's row of each row of the weight; None: row // block_rows
    block_rows: int


class Experts(NamedTuple):
    """Which matrices of a stack multiply."""

    ids: torch.Tensor  # contiguous integers [number]; those outside of the stack, counted from `first` on, give zeros
    first: int


@triton.jit
def _scaled(
    x,
    scales_ptr,
    grid_rows,
    first,
    columns,
    mask,
    num_grid_columns,
    SCALES: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A part of the row, float32 [1, columns]; where weights have scales of blocks, times those of some rows there.

    That is one multiplication for each column of x where the rows share a block, not for each weight.
    """
    if SCALES == "blocks":
        NUM: tl.constexpr = BLOCK_COLUMNS // GROUP_COLUMNS
        groups = first // GROUP_COLUMNS + tl.arange(0, NUM)
        groups = tl.minimum(groups, num_grid_columns - 1)  # behind the last one x is zero
        scales = tl.load(scales_ptr + grid_rows * num_grid_columns + groups)
        scales = tl.reshape(tl.broadcast_to(scales[:, None], (NUM, GROUP_COLUMNS)), (1, BLOCK_COLUMNS))
        x = x * scales
    if SCALES == "grid rows":
        places = grid_rows[:, None] * num_grid_columns + (columns // GROUP_COLUMNS)[None, :]
        x = x * tl.load(scales_ptr + places, mask=mask[None, :], other=0.0)
    return x


@triton.jit
def _grid_rows(grid_rows_ptr, first, num_rows, block_rows, SCALES: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The rows of the grid of scales for BLOCK_ROWS rows from `first` on: one for each, or one for all."""
    grid_rows = first // block_rows
    if SCALES == "grid rows":
        rows = first + tl.arange(0, BLOCK_ROWS)
        grid_rows = tl.load(grid_rows_ptr + rows, mask=rows < num_rows, other=0)
    return grid_rows


@triton.jit
def _products(weight, x, SCALES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """weight * x in float32, [rows, columns]; of fp8 the sums of the 16 columns that a thread reads at once.

    A thread reads so many of those that sums for each column would take registers from other programs.
    """
    products = weight.to(tl.float32) * x
    if SCALES != "":
        products = tl.sum(tl.reshape(products, (BLOCK_ROWS, BLOCK_COLUMNS // 16, 16)), axis=2)
    return products


@triton.jit
def _output(acc, rows, row_mask, scales_ptr, bias_ptr, SCALES: tl.constexpr, HAS_BIAS: tl.constexpr):
    """float32 [rows] of what was added up, [rows, any]."""
    out = tl.sum(acc, axis=1)
    if SCALES == "rows":
        out *= tl.load(scales_ptr + rows, mask=row_mask, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
    return out


@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scales_ptr,
    grid_rows_ptr,
    ids_ptr,
    out_ptr,
    num_rows,
    num_columns,
    num_grid_columns,
    block_rows,
    first_expert,
    num_experts,
    x_stride,
    matrices_per_row,
    matrix_stride,
    scale_stride,
    HAS_EXPERTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program makes BLOCK_ROWS outputs; with ACTIVATION, from those rows and the ones num_rows below them.

    SCALES is "", "rows", "blocks", or "grid rows" where the rows of a program may be in several blocks. The first
    weights are read before the wait for the kernel that makes x: nothing writes weights. Of a stack, they can't be: the
    router must have said which.
    """
    first_row = tl.program_id(0) * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < num_rows
    if HAS_EXPERTS:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        place = tl.program_id(1).to(tl.int64)
        expert = tl.load(ids_ptr + place).to(tl.int64) - first_expert
        is_here = (expert >= 0) & (expert < num_experts)
        row_mask = rows < tl.where(is_here, num_rows, 0)
        expert = tl.where(is_here, expert, 0)
        weight_ptr += expert * matrix_stride
        scales_ptr += expert * scale_stride
        x_ptr += place // matrices_per_row * x_stride
        out_ptr += place * num_rows
    columns = tl.arange(0, BLOCK_COLUMNS)
    weight_ptrs = weight_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    up_offset = tl.cast(num_rows, tl.int64) * num_columns
    mask = columns < num_columns
    weight = tl.load(weight_ptrs, mask=row_mask[:, None] & mask[None, :], other=0.0)
    grid_rows = _grid_rows(grid_rows_ptr, first_row, num_rows, block_rows, SCALES, BLOCK_ROWS)
    if ACTIVATION != "":
        up_weight = tl.load(weight_ptrs + up_offset, mask=row_mask[:, None] & mask[None, :], other=0.0)
        up_grid_rows = _grid_rows(grid_rows_ptr, num_rows + first_row, 2 * num_rows, block_rows, SCALES, BLOCK_ROWS)
    if EARLY and not HAS_EXPERTS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    acc = _products(
        weight,
        _scaled(x, scales_ptr, grid_rows, 0, columns, mask, num_grid_columns, SCALES, GROUP_COLUMNS, BLOCK_COLUMNS),
        SCALES,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
    )
    if ACTIVATION != "":
        up_acc = _products(
            up_weight,
            _scaled(
                x, scales_ptr, up_grid_rows, 0, columns, mask, num_grid_columns, SCALES, GROUP_COLUMNS, BLOCK_COLUMNS
            ),
            SCALES,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )
    for start in range(BLOCK_COLUMNS, num_columns, BLOCK_COLUMNS):
        places = start + columns
        mask = places < num_columns
        weight = tl.load(weight_ptrs + start, mask=row_mask[:, None] & mask[None, :], other=0.0)
        if ACTIVATION != "":
            up_weight = tl.load(weight_ptrs + up_offset + start, mask=row_mask[:, None] & mask[None, :], other=0.0)
        x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)[None, :]
        acc += _products(
            weight,
            _scaled(
                x, scales_ptr, grid_rows, start, places, mask, num_grid_columns, SCALES, GROUP_COLUMNS, BLOCK_COLUMNS
            ),
            SCALES,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )
        if ACTIVATION != "":
            up_acc += _products(
                up_weight,
                _scaled(
                    x,
                    scales_ptr,
                    up_grid_rows,
                    start,
                    places,
                    mask,
                    num_grid_columns,
                    SCALES,
                    GROUP_COLUMNS,
                    BLOCK_COLUMNS,
                ),
                SCALES,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
            )
    out = _output(acc, rows, row_mask, scales_ptr, bias_ptr, SCALES, HAS_BIAS)
    if ACTIVATION != "":
        up = _output(up_acc, num_rows + rows, row_mask, scales_ptr, bias_ptr, SCALES, HAS_BIAS)
        out = activate(out, ACTIVATION) * up
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=rows < num_rows)


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scales: torch.Tensor | BlockScales | None = None,
    activation: str = "",
    tile: Tile | None = None,
    experts: Experts | None = None,
) -> torch.Tensor:
    """x W^T + b, or with an activation's name act(first half) * second half of it.

    Args:
        x: contiguous [1, num_columns]; with experts also a row for each of them, or for each run of as many.
        weight: contiguous [num_rows, num_columns]; any floating-point type. With experts a stack of such, without bias.
        scales: float32 [num_rows, 1] that multiply the rows of the weight, or those of its blocks; those of a stack
            have its number of matrices in front.
        tile: None takes what was measured, or else the best that is known.

    Returns:
        [1, num_rows], or [1, num_rows / 2]; with experts a row for each.
    """
    all_rows, num_columns = weight.shape[-2:]
    num_rows, number = all_rows // 2 if activation else all_rows, 1 if experts is None else len(experts.ids)
    assert x.shape[1] == num_columns and number % len(x) == 0 and x.is_contiguous() and weight.is_contiguous()
    assert experts is None or (weight.dim() == 3 and bias is None and experts.ids.is_contiguous())
    out = torch.empty((number, num_rows), dtype=x.dtype, device=x.device)
    if tile is None:
        is_fp8 = weight.element_size() == 1
        default = (GATED_FP8_TILE if is_fp8 else GATED_TILE) if activation else FP8_TILE if is_fp8 else TILE
        scale_kind = 0 if scales is None else 1 if isinstance(scales, torch.Tensor) else 2
        shape = num_rows, num_columns, weight.element_size(), scale_kind, number
        tile = Tile(*GEMV.pick(default, int(bool(activation)), *shape))
    kind, grid, grid_rows, block_rows = "", x, None, 1
    if isinstance(scales, torch.Tensor):
        kind, grid = "rows", scales
    elif scales is not None:
        grid, grid_rows, block_rows = scales
        is_uniform = grid_rows is None and block_rows % tile.rows == num_rows % tile.rows == 0
        if grid_rows is None and not is_uniform:
            grid_rows = torch.arange(all_rows, dtype=torch.int32, device=x.device) // block_rows
        kind = "blocks" if is_uniform else "grid rows"
    early = can_launch_early(x.device)
    _gemv_kernel[(triton.cdiv(num_rows, tile.rows), number)](
        x,
        weight,
        bias if bias is not None else x,
        grid,
        grid_rows if grid_rows is not None else x,
        experts.ids if experts is not None else x,
        out,
        num_rows,
        num_columns,
        grid.shape[-1],
        block_rows,
        experts.first if experts is not None else 0,
        len(weight),
        num_columns,
        number // len(x),
        all_rows * num_columns,
        grid.shape[-2] * grid.shape[-1],
        HAS_EXPERTS=experts is not None,
        HAS_BIAS=bias is not None,
        SCALES=kind,
        ACTIVATION=activation,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=INTERPRETED_COLUMNS if is_interpreted() else tile.columns,
        GROUP_COLUMNS=GROUP_COLUMNS,
        EARLY=early,
        num_warps=tile.num_warps,
        **({"launch_pdl": True} if early else {}),
    )
    return out
