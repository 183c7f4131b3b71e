"""Owns the product of one row with a weight matrix: a decode pass of one request, bound by reading the weights."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.activation import activate
from ramet.srt.layers.kernels.runtime import can_launch_early, is_interpreted

BLOCK_ROWS = 2
GATED_BLOCK_ROWS = 1  # and as many of the other half
BLOCK_COLUMNS = 1024
NUM_WARPS = 4


@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scales_ptr,
    out_ptr,
    num_rows,
    num_columns,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program makes BLOCK_ROWS outputs; with ACTIVATION, from those rows and the ones num_rows below them.

    The first weights are read before the wait for the kernel that makes x: nothing writes weights.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = (rows < num_rows)[:, None]
    columns = tl.arange(0, BLOCK_COLUMNS)
    weight_ptrs = weight_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    up_offset = tl.cast(num_rows, tl.int64) * num_columns
    column_mask = columns < num_columns
    weight = tl.load(weight_ptrs, mask=row_mask & column_mask[None, :], other=0.0)
    if ACTIVATION != "":
        up_weight = tl.load(weight_ptrs + up_offset, mask=row_mask & column_mask[None, :], other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    acc = weight.to(tl.float32) * x
    if ACTIVATION != "":
        up_acc = up_weight.to(tl.float32) * x
    for start in range(BLOCK_COLUMNS, num_columns, BLOCK_COLUMNS):
        column_mask = start + columns < num_columns
        mask = row_mask & column_mask[None, :]
        weight = tl.load(weight_ptrs + start, mask=mask, other=0.0)
        if ACTIVATION != "":
            up_weight = tl.load(weight_ptrs + up_offset + start, mask=mask, other=0.0)
        x = tl.load(x_ptr + start + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        acc += weight.to(tl.float32) * x
        if ACTIVATION != "":
            up_acc += up_weight.to(tl.float32) * x
    out = tl.sum(acc, axis=1)
    if HAS_SCALES:
        out *= tl.load(scales_ptr + rows, mask=rows < num_rows, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        up = tl.sum(up_acc, axis=1)
        if HAS_SCALES:
            up *= tl.load(scales_ptr + num_rows + rows, mask=rows < num_rows, other=0.0)
        if HAS_BIAS:
            up += tl.load(bias_ptr + num_rows + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
        out = activate(out, ACTIVATION) * up
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=rows < num_rows)


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    activation: str = "",
) -> torch.Tensor:
    """x W^T + b, or with an activation's name act(first half) * second half of it.

    Args:
        x: contiguous [1, num_columns].
        weight: contiguous [num_rows, num_columns]; any floating-point type.
        scales: float32 [num_rows, 1] that multiply the rows of the weight.

    Returns:
        [1, num_rows], or [1, num_rows / 2].
    """
    num_rows = weight.shape[0] // 2 if activation else weight.shape[0]
    assert x.shape == (1, weight.shape[1]) and x.is_contiguous() and weight.is_contiguous()
    out = torch.empty((1, num_rows), dtype=x.dtype, device=x.device)
    block_rows = GATED_BLOCK_ROWS if activation else BLOCK_ROWS
    launch_gemv(x, weight, bias, scales, out, activation, block_rows, BLOCK_COLUMNS, NUM_WARPS)
    return out


def launch_gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    block_rows: int,
    block_columns: int,
    num_warps: int,
) -> None:
    """The launch, with the tile that one program takes."""
    early = can_launch_early(x.device)
    if is_interpreted():
        block_columns = 64
    _gemv_kernel[(triton.cdiv(out.shape[1], block_rows),)](
        x,
        weight,
        bias if bias is not None else x,
        scales if scales is not None else x,
        out,
        out.shape[1],
        weight.shape[1],
        HAS_BIAS=bias is not None,
        HAS_SCALES=scales is not None,
        ACTIVATION=activation,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        EARLY=early,
        num_warps=num_warps,
        **({"launch_pdl": True} if early else {}),
    )
