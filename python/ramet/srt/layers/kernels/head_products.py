"""Owns the products of each head with its own part of an fp8 matrix with scales of blocks, which is read as it is."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early, dot_precision, next_power_of_2

MIN_TOKENS, MAX_TOKENS = 16, 64  # of a program: few decode, many are prompts
BLOCK_OUT = 128
BLOCK_IN = 64


@triton.jit(do_not_specialize=["num_tokens"])
def _head_product_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    scale_rows_ptr,
    out_ptr,
    num_tokens,
    x_stride,
    x_head_stride,
    out_stride,
    out_head_stride,
    weight_stride,
    scales_stride,
    head_rows,
    first_row,
    num_in,
    num_out,
    HAS_SCALE_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    OUT_IS_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program makes a block of one head's outputs for some tokens; rows of the weight are outputs, or inputs."""
    head = tl.program_id(0)
    tokens = (tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    outs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token_mask = tokens < num_tokens
    out_mask = outs < num_out
    row_base = head * head_rows + first_row
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BLOCK_TOKENS, BLOCK_OUT], tl.float32)
    x_ptrs = x_ptr + (tokens * x_stride + head * x_head_stride)[:, None]
    for start in range(0, num_in, BLOCK_IN):
        ins = start + tl.arange(0, BLOCK_IN)
        in_mask = ins < num_in
        x = tl.load(x_ptrs + ins[None, :], mask=token_mask[:, None] & in_mask[None, :], other=0.0)
        mask = in_mask[:, None] & out_mask[None, :]
        if OUT_IS_ROWS:
            rows = row_base + outs
            row_mask = out_mask
            columns = ins
        else:
            rows = row_base + ins
            row_mask = in_mask
            columns = outs
        scale_rows = rows // SCALE_ROWS
        if HAS_SCALE_ROWS:
            scale_rows = tl.load(scale_rows_ptr + rows, mask=row_mask, other=0)
        rows = rows.to(tl.int64) * weight_stride
        scale_rows = scale_rows * scales_stride
        scale_columns = columns // SCALE_COLUMNS
        if OUT_IS_ROWS:
            places = rows[None, :] + columns[:, None]
            scale_places = scale_rows[None, :] + scale_columns[:, None]
        else:
            places = rows[:, None] + columns[None, :]
            scale_places = scale_rows[:, None] + scale_columns[None, :]
        w = tl.load(weight_ptr + places, mask=mask, other=0.0).to(tl.float32)
        w *= tl.load(scales_ptr + scale_places, mask=mask, other=0.0).to(tl.float32)
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision=PRECISION)
    out_ptrs = out_ptr + (tokens * out_stride + head * out_head_stride)[:, None] + outs[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=token_mask[:, None] & out_mask[None, :])


def head_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    scale_rows: torch.Tensor | None,
    block: tuple[int, int],
    out: torch.Tensor,
    *,
    first_row: int,
    rows_are_outputs: bool,
) -> None:
    """out[:, h] = x[:, h] W_h^T, or x[:, h] W_h, with some rows of each head's part of a matrix. Exact up to rounding.

    Each product of a number and its scale is rounded to the type of x once, as where a weight is dequantised.

    Args:
        x: [num_tokens, num_heads, inputs], the columns of a head contiguous; so is out, [..., outputs].
        weight: contiguous float8_e4m3fn [num_heads * head_rows, columns]; columns are inputs, or outputs.
        scales: contiguous [grid rows, grid columns]; of `block` rows and columns each.
        scale_rows: int32 [num_heads * head_rows], the grid's row of each row; None: row // block[0].
        first_row: of those of each head that are meant: as many as there are outputs, or inputs.
    """
    num_tokens, num_heads, num_in = x.shape
    num_out = out.shape[2]
    if num_tokens == 0:
        return
    assert x.stride(2) == out.stride(2) == 1 and weight.is_contiguous() and scales.is_contiguous()
    block_tokens = min(MAX_TOKENS, max(MIN_TOKENS, next_power_of_2(num_tokens)))
    early = can_launch_early(x.device)
    _head_product_kernel[(num_heads, triton.cdiv(num_out, BLOCK_OUT), triton.cdiv(num_tokens, block_tokens))](
        x,
        weight,
        scales,
        scales if scale_rows is None else scale_rows,
        out,
        num_tokens,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        weight.stride(0),
        scales.stride(0),
        weight.shape[0] // num_heads,
        first_row,
        num_in,
        num_out,
        HAS_SCALE_ROWS=scale_rows is not None,
        SCALE_ROWS=block[0],
        SCALE_COLUMNS=block[1],
        OUT_IS_ROWS=rows_are_outputs,
        BLOCK_TOKENS=block_tokens,
        BLOCK_IN=BLOCK_IN,
        BLOCK_OUT=BLOCK_OUT,
        PRECISION=dot_precision(x.dtype),
        EARLY=early,
        num_warps=4,
        num_stages=3,
        **({"launch_pdl": True} if early else {}),
    )
