"""Owns products in fp8 with scales of blocks: rows are quantised by groups of columns, weights have blocks of them.

Sums over the columns of one group are made in the matrix units; each is scaled and added up in float32 (DeepSeek-V3,
2024, section 3.3). How many rows a group of experts has is read on the GPU alone, so that a CUDA graph can hold a
launch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.activation import activate
from ramet.srt.layers.kernels.choices import FP8_BLOCKS, row_class
from ramet.srt.layers.kernels.fp8 import MAX_FP8, MIN_SCALE
from ramet.srt.layers.kernels.grouped_linear import find_tile, max_tiles
from ramet.srt.layers.kernels.runtime import can_launch_early, is_interpreted, next_power_of_2, num_multiprocessors
from ramet.srt.layers.kernels.split_sums import counts_of

GROUP_COLUMNS = 128  # that share a scale, of rows and of weights
ROW_ALIGNMENT = 4  # torch's product takes scales of so many rows
QUANTIZED_ROWS = 16  # of one program
FULL = 0.7  # of the multiprocessors that have a program: from there on columns are not split further
MAX_SPLITS = 4


class Tile(NamedTuple):
    """What one program makes, and how."""

    rows: int
    outputs: int
    is_turned: bool  # outputs are the matrix units' rows, of which there are 64 at least
    num_warps: int
    num_stages: int


# By the most rows, of each group on average. Measured on an H200.
TILES = {
    16: Tile(16, 128, True, 4, 4),
    32: Tile(32, 128, True, 4, 4),
    256: Tile(64, 128, True, 8, 4),
}
LARGE_TILE = Tile(128, 64, False, 4, 4)
INTERPRETED_TILES = {16: Tile(16, 32, True, 4, 1)}
INTERPRETED_LARGE_TILE = Tile(32, 32, False, 4, 1)


@triton.jit
def _quantize_groups_kernel(
    x_ptr,
    out_ptr,
    scales_ptr,
    num_rows,
    num_columns,
    x_stride,
    scale_stride,
    max_value,
    min_scale,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program quantises one group of columns of ROWS rows; with ACTIVATION, of act(first half) * second half."""
    group = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = group * COLUMNS + tl.arange(0, COLUMNS)
    row_mask = rows < num_rows
    mask = row_mask[:, None] & (columns < num_columns)[None, :]
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows = rows.to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * x_stride + columns[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        up = tl.load(x_ptrs + num_columns, mask=mask, other=0.0).to(tl.float32)
        x = (activate(x, ACTIVATION) * up).to(x_ptr.dtype.element_ty).to(tl.float32)
    scales = tl.maximum(tl.max(tl.abs(x), axis=1) / max_value, min_scale)
    values = (x / scales[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(scales_ptr + group * scale_stride + rows, scales, mask=row_mask)
    tl.store(out_ptr + rows[:, None] * num_columns + columns[None, :], values, mask=mask)


def quantize_groups(x: torch.Tensor, activation: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """[num_rows, n] -> fp8 (e4m3) of the same shape, contiguous, and float32 scales [num_rows, ceil(n / 128)].

    The scales of a group of columns lie behind each other, as torch's product wants them. With an activation's name,
    act(first half) * second half of x is quantised, rounded to the type of x before.
    """
    num_rows, num_columns = x.shape[0], x.shape[1] // 2 if activation else x.shape[1]
    assert x.stride(1) == 1
    num_groups = triton.cdiv(num_columns, GROUP_COLUMNS)
    values = torch.empty((num_rows, num_columns), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((num_groups, num_rows), dtype=torch.float32, device=x.device)
    if num_rows:
        early = can_launch_early(x.device)
        rows = min(QUANTIZED_ROWS, next_power_of_2(num_rows))
        _quantize_groups_kernel[(num_groups, triton.cdiv(num_rows, rows))](
            x, values, scales, num_rows, num_columns, x.stride(0), scales.stride(0), MAX_FP8, MIN_SCALE,
            ACTIVATION=activation, ROWS=rows, COLUMNS=GROUP_COLUMNS, EARLY=early, num_warps=max(1, rows // 4),
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return values, scales.T


@triton.jit
def _block_product(x, weight, TURNED: tl.constexpr):
    """float32 x W^T of a tile [rows, columns] and one [outputs, columns]; with TURNED, W x^T."""
    return tl.dot(weight, tl.trans(x)) if TURNED else tl.dot(x, tl.trans(weight))


@triton.jit
def _add_parts(acc, partial_ptr, places, mask, size, counter, SPLITS: tl.constexpr):
    """Leave a program's sums; for the last one of a tile, whether it is that one, and all sums added up in order."""
    tl.store(partial_ptr + tl.program_id(2) * size + places, acc, mask=mask)
    tl.debug_barrier()  # all of the program's sums are there before it counts
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        acc = tl.zeros_like(acc)
        for one in tl.static_range(SPLITS):
            acc += tl.load(partial_ptr + one * size + places, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(counter, 0)
    return is_last, acc


@triton.jit
def _blocks_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    row_blocks_ptr,
    ends_ptr,
    out_ptr,
    partial_ptr,
    counts_ptr,
    num_rows,
    num_groups,
    num_columns,
    num_outputs,
    x_scale_stride,
    num_grid_rows,
    num_grid_columns,
    output_block,
    HAS_GROUPS: tl.constexpr,
    HAS_ROW_BLOCKS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    TURNED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program makes BLOCK_OUTPUTS outputs of BLOCK_ROWS rows of one group; those too many find no group.

    Where columns are split, each program leaves its sums, and the last one of a tile adds them up, always in the same
    order; see few_rows.py.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
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
        end = num_rows
    part = tl.program_id(2)
    rows = start + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < end
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    output_mask = outputs < num_outputs
    columns = tl.arange(0, BLOCK_COLUMNS)
    row_blocks = outputs // output_block
    if HAS_ROW_BLOCKS:
        row_blocks = tl.load(row_blocks_ptr + outputs, mask=output_mask, other=0)
    group = tl.cast(group, tl.int64)
    grid_ptrs = scales_ptr + (group * num_grid_rows + row_blocks) * num_grid_columns
    weight_ptrs = weight_ptr + (group * num_outputs + outputs)[:, None] * num_columns + columns[None, :]
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    num_blocks = tl.cdiv(num_columns, BLOCK_COLUMNS)
    first_block, last_block = part * num_blocks // SPLITS, (part + 1) * num_blocks // SPLITS
    acc = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS] if TURNED else [BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for block in range(first_block, last_block):
        first = block * BLOCK_COLUMNS
        if IS_EVEN:
            x = tl.load(x_ptrs + first, mask=row_mask[:, None], other=0.0)
            weight = tl.load(weight_ptrs + first, mask=output_mask[:, None], other=0.0)
        else:
            column_mask = (first + columns < num_columns)[None, :]
            x = tl.load(x_ptrs + first, mask=row_mask[:, None] & column_mask, other=0.0)
            weight = tl.load(weight_ptrs + first, mask=output_mask[:, None] & column_mask, other=0.0)
        x_scales = tl.load(x_scales_ptr + block * x_scale_stride + rows, mask=row_mask, other=0.0)
        scales = tl.load(grid_ptrs + block, mask=output_mask, other=0.0)
        product = _block_product(x, weight, TURNED)
        if TURNED:
            acc += product * (scales[:, None] * x_scales[None, :])
        else:
            acc += product * (x_scales[:, None] * scales[None, :])
    if TURNED:
        acc = tl.trans(acc)
    mask = row_mask[:, None] & output_mask[None, :]
    is_last = True
    if SPLITS > 1:
        places = rows[:, None] * num_outputs + outputs[None, :]
        counter = counts_ptr + tile * tl.num_programs(1) + tl.program_id(1)
        is_last, acc = _add_parts(acc, partial_ptr, places, mask, num_rows * num_outputs, counter, SPLITS)
    if is_last:
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def blocks_linear(
    values: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    row_blocks: torch.Tensor | None,
    output_block: int,
    ends: torch.Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> torch.Tensor:
    """x W^T with the W of each row's group, in `dtype`.

    Args:
        values, x_scales: of `quantize_groups`, [num_rows, n] and [num_rows, ceil(n / 128)], rows sorted by group.
        weight: fp8, contiguous [num_groups, num_outputs, n].
        scales: float32, contiguous [num_groups, num_grid_rows, ceil(n / 128)].
        row_blocks: int32 [num_outputs], the grid's row of each output; None where `output_block` of them share one.
        ends: int32 [num_groups], where each group's rows end; None where all rows belong to the only one.
        tile: None chooses one.
    """
    (num_rows, num_columns), (num_groups, num_outputs, _) = values.shape, weight.shape
    assert values.is_contiguous() and weight.is_contiguous() and scales.is_contiguous()
    out = torch.empty((num_rows, num_outputs), dtype=dtype, device=values.device)
    if num_rows == 0:
        return out
    if tile is None:
        default = choose_tile(num_rows, num_groups)
        shape = row_class(num_rows), num_groups, num_outputs, num_columns
        rows, outputs, is_turned, num_warps, num_stages = FP8_BLOCKS.pick(default, *shape)
        tile = Tile(rows, outputs, bool(is_turned), num_warps, num_stages)
    num_tiles = max_tiles(num_rows, num_groups, tile.rows)
    num_output_tiles = triton.cdiv(num_outputs, tile.outputs)
    splits, partial, counts = 1, out, out
    if ends is None:
        splits = _num_splits(num_tiles * num_output_tiles, values.device)
    if splits > 1:
        partial = torch.empty((splits, num_rows, num_outputs), dtype=torch.float32, device=values.device)
        counts = counts_of(values.device)
    early = can_launch_early(values.device)
    _blocks_kernel[(num_tiles, num_output_tiles, splits)](
        values,
        x_scales,
        weight,
        scales,
        counts if row_blocks is None else row_blocks,
        counts if ends is None else ends,
        out,
        partial,
        counts,
        num_rows,
        num_groups,
        num_columns,
        num_outputs,
        x_scales.stride(1),
        *scales.shape[1:],
        output_block,
        HAS_GROUPS=ends is not None,
        HAS_ROW_BLOCKS=row_blocks is not None,
        IS_EVEN=num_columns % GROUP_COLUMNS == 0,
        TURNED=tile.is_turned,
        SPLITS=splits,
        BLOCK_GROUPS=max(32, next_power_of_2(num_groups)),
        BLOCK_ROWS=tile.rows,
        BLOCK_OUTPUTS=tile.outputs,
        BLOCK_COLUMNS=GROUP_COLUMNS,
        EARLY=early,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **({"launch_pdl": True} if early else {}),
    )
    return out


def choose_tile(num_rows: int, num_groups: int) -> Tile:
    """Where nothing was measured: by the rows of a group, on average."""
    tiles, largest = (INTERPRETED_TILES, INTERPRETED_LARGE_TILE) if is_interpreted() else (TILES, LARGE_TILE)
    return next((tile for most, tile in tiles.items() if num_rows <= most * num_groups), largest)


def _num_splits(num_programs: int, device: torch.device) -> int:
    """Into how many parts columns are split, so that all multiprocessors have work."""
    splits = 1
    while splits < MAX_SPLITS and num_programs * splits < FULL * num_multiprocessors(device):
        splits *= 2
    return splits
