"""Owns the product of one row with an fp8 matrix that has scales of blocks, bound by reading the matrix."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.activation import activate
from ramet.srt.layers.kernels.runtime import can_launch_early, is_interpreted

GROUP_COLUMNS = 128  # that share a scale
TILE = (8, 8, 4)  # (outputs, groups of columns read at once, warps) of one program
GATED_TILE = (4, 8, 4)  # and as many outputs of the other half
INTERPRETED_TILE = (8, 2, 4)


@triton.jit
def _dot_groups(
    acc,
    x,
    weight_ptrs,
    scale_ptrs,
    first_group,
    row_mask,
    num_columns,
    num_groups,
    GROUPS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
):
    """acc [outputs, 128] with the products of GROUPS groups of columns added; `x` points to the row."""
    columns = tl.arange(0, GROUP_COLUMNS)
    for place in tl.static_range(GROUPS):
        group = first_group + place
        first = group * GROUP_COLUMNS
        column_mask = first + columns < num_columns
        mask = row_mask[:, None]
        if not IS_EVEN:
            mask = mask & column_mask[None, :]
        values = tl.load(weight_ptrs + first, mask=mask, other=0.0)
        # Behind the last group any scale will do: values are zero there.
        scales = tl.load(scale_ptrs + tl.minimum(group, num_groups - 1), mask=row_mask, other=0.0)
        row = tl.load(x + first + columns, mask=column_mask, other=0.0).to(tl.float32)
        acc += values.to(tl.float32) * (row[None, :] * scales[:, None])
    return acc


@triton.jit
def _gemv_blocks_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scales_ptr,
    row_blocks_ptr,
    out_ptr,
    num_rows,
    num_columns,
    num_groups,
    row_block,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_BLOCKS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program makes BLOCK_ROWS outputs; with ACTIVATION, from those rows and the ones num_rows below them."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < num_rows
    up_rows = rows + num_rows
    blocks, up_blocks = rows // row_block, up_rows // row_block
    if HAS_ROW_BLOCKS:
        blocks = tl.load(row_blocks_ptr + rows, mask=row_mask, other=0)
        if ACTIVATION != "":
            up_blocks = tl.load(row_blocks_ptr + up_rows, mask=row_mask, other=0)
    columns = tl.arange(0, GROUP_COLUMNS)
    weight_ptrs = weight_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    up_weight_ptrs = weight_ptr + up_rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    scale_ptrs, up_scale_ptrs = scales_ptr + blocks * num_groups, scales_ptr + up_blocks * num_groups
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_ROWS, GROUP_COLUMNS], tl.float32)
    up_acc = tl.zeros([BLOCK_ROWS, GROUP_COLUMNS], tl.float32)
    for first in range(0, num_groups, GROUPS):
        acc = _dot_groups(
            acc, x_ptr, weight_ptrs, scale_ptrs, first, row_mask, num_columns, num_groups, GROUPS, IS_EVEN,
            GROUP_COLUMNS,
        )  # fmt: skip
        if ACTIVATION != "":
            up_acc = _dot_groups(
                up_acc, x_ptr, up_weight_ptrs, up_scale_ptrs, first, row_mask, num_columns, num_groups, GROUPS,
                IS_EVEN, GROUP_COLUMNS,
            )  # fmt: skip
    out = tl.sum(acc, axis=1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        up = tl.sum(up_acc, axis=1)
        if HAS_BIAS:
            up += tl.load(bias_ptr + up_rows, mask=row_mask, other=0.0).to(tl.float32)
        out = activate(out, ACTIVATION) * up
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=row_mask)


def gemv_blocks(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    row_blocks: torch.Tensor | None,
    row_block: int,
    bias: torch.Tensor | None = None,
    activation: str = "",
    tile: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """x W^T + b, or with an activation's name act(first half) * second half of it.

    Args:
        x: contiguous [1, num_columns], as it is.
        weight: fp8, contiguous [num_rows, num_columns].
        scales: float32, contiguous [num_grid_rows, ceil(num_columns / 128)].
        row_blocks: int32 [num_rows], the grid's row of each row; None where `row_block` of them share one.
        tile: None takes the best that is known.

    Returns:
        [1, num_rows], or [1, num_rows / 2].
    """
    num_rows, num_columns = weight.shape
    assert x.shape == (1, num_columns) and x.is_contiguous() and weight.is_contiguous() and scales.is_contiguous()
    num_rows = num_rows // 2 if activation else num_rows
    out = torch.empty((1, num_rows), dtype=x.dtype, device=x.device)
    block_rows, groups, num_warps = tile or (GATED_TILE if activation else TILE)
    if is_interpreted():
        block_rows, groups, num_warps = INTERPRETED_TILE
    early = can_launch_early(x.device)
    _gemv_blocks_kernel[(triton.cdiv(num_rows, block_rows),)](
        x,
        weight,
        x if bias is None else bias,
        scales,
        scales if row_blocks is None else row_blocks,
        out,
        num_rows,
        num_columns,
        scales.shape[1],
        row_block,
        HAS_BIAS=bias is not None,
        HAS_ROW_BLOCKS=row_blocks is not None,
        IS_EVEN=num_columns % (groups * GROUP_COLUMNS) == 0,
        ACTIVATION=activation,
        BLOCK_ROWS=block_rows,
        GROUPS=groups,
        GROUP_COLUMNS=GROUP_COLUMNS,
        EARLY=early,
        num_warps=num_warps,
        **({"launch_pdl": True} if early else {}),
    )
    return out
