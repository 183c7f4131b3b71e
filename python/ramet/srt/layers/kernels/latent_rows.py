"""Owns the kernel between the projections of latent attention and attention: rows are normed, rotated and stored.

The queries are rotated on the way to where attention reads them.
"""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early, next_power_of_2

HEADS_PER_PROGRAM = 16


@triton.jit
def pair_columns(pairs, HALF: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """Where the two coordinates of each rotating pair stand among the columns that rotate."""
    if IS_INTERLEAVED:
        firsts = 2 * pairs
        seconds = firsts + 1
    else:
        firsts = pairs
        seconds = pairs + HALF
    return firsts, seconds


@triton.jit
def turn(first, second, cos_ptr, sin_ptr, token, pairs, pair_mask, HALF: tl.constexpr):
    """Two [heads, pairs] of coordinates, turned by the angles of a token; float32."""
    cos = tl.load(cos_ptr + token * HALF + pairs, mask=pair_mask, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * HALF + pairs, mask=pair_mask, other=0.0).to(tl.float32)[None, :]
    first, second = first.to(tl.float32), second.to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store_rows_kernel(
    rows_ptr,
    q_ptr,
    queries_ptr,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    slots_ptr,
    cache_ptr,
    rows_stride,
    q_stride,
    queries_stride,
    cache_stride,
    num_heads,
    q_dim,
    out_dim,
    eps,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The first program of a token takes its row, each other one a few heads of its queries."""
    token = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, BLOCK_HALF)
    pair_mask = pairs < HALF
    firsts, seconds = pair_columns(pairs, HALF, IS_INTERLEAVED)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if tl.program_id(1) == 0:
        row_ptr = rows_ptr + token * rows_stride
        out_ptr = cache_ptr + tl.load(slots_ptr + token).to(tl.int64) * cache_stride
        columns = tl.arange(0, BLOCK_RANK)
        column_mask = columns < RANK
        row = tl.load(row_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(row * row, axis=0) / RANK + eps)
        tl.store(out_ptr + columns, (row * scale * weight).to(cache_ptr.dtype.element_ty), mask=column_mask)
        row_mask = pair_mask[None, :]
        row_firsts, row_seconds = RANK + firsts[None, :], RANK + seconds[None, :]
        x = tl.load(row_ptr + row_firsts, mask=row_mask, other=0.0)
        y = tl.load(row_ptr + row_seconds, mask=row_mask, other=0.0)
        x, y = turn(x, y, cos_ptr, sin_ptr, token, pairs, pair_mask, HALF)
        tl.store(out_ptr + row_firsts, x.to(cache_ptr.dtype.element_ty), mask=row_mask)
        tl.store(out_ptr + row_seconds, y.to(cache_ptr.dtype.element_ty), mask=row_mask)
    else:
        heads = (tl.program_id(1) - 1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (heads < num_heads)[:, None] & pair_mask[None, :]
        in_ptrs = q_ptr + token * q_stride + (heads * q_dim + q_dim - 2 * HALF)[:, None]
        first = tl.load(in_ptrs + firsts[None, :], mask=mask, other=0.0)
        second = tl.load(in_ptrs + seconds[None, :], mask=mask, other=0.0)
        first, second = turn(first, second, cos_ptr, sin_ptr, token, pairs, pair_mask, HALF)
        out_ptrs = queries_ptr + token * queries_stride + (heads * out_dim + out_dim - 2 * HALF)[:, None]
        tl.store(out_ptrs + firsts[None, :], first.to(queries_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptrs + seconds[None, :], second.to(queries_ptr.dtype.element_ty), mask=mask)


def store_rows(
    rows: torch.Tensor,
    q: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    slots: torch.Tensor,
    cache: torch.Tensor,
    queries: torch.Tensor,
    *,
    is_interleaved: bool,
) -> None:
    """Write the tokens' rows to `slots` of the cache, and what rotates of q to the last columns of the queries.

    Args:
        rows: [num_tokens, rank + rope_dim], each row contiguous: what is normed, and behind it what rotates.
        q: [num_tokens, num_heads, query_dim], each token contiguous; the last rope_dim columns rotate.
        cos, sin: contiguous [num_tokens, 1, rope_dim / 2].
        weight: [rank], of the norm.
        slots: int64 [num_tokens].
        cache: [num_slots, 1, rank + rope_dim], each slot contiguous.
        queries: [num_tokens, num_heads, at least rope_dim], each token contiguous; may be q.
        is_interleaved: see LatentTraits.
    """
    num_tokens, num_heads, q_dim = q.shape
    rank, half, out_dim = weight.shape[0], cos.shape[-1], queries.shape[2]
    assert q.stride()[1:] == (q_dim, 1) and queries.stride()[1:] == (out_dim, 1)
    assert rows.stride(1) == cache.stride(2) == 1 and rows.shape[1] == cache.shape[2] == rank + 2 * half
    early = can_launch_early(q.device)
    block_heads = min(HEADS_PER_PROGRAM, next_power_of_2(num_heads))
    _store_rows_kernel[(num_tokens, 1 + triton.cdiv(num_heads, block_heads))](
        rows,
        q,
        queries,
        cos,
        sin,
        weight,
        slots,
        cache,
        rows.stride(0),
        q.stride(0),
        queries.stride(0),
        cache.stride(0),
        num_heads,
        q_dim,
        out_dim,
        eps,
        RANK=rank,
        BLOCK_RANK=next_power_of_2(rank),
        HALF=half,
        BLOCK_HALF=next_power_of_2(half),
        IS_INTERLEAVED=is_interleaved,
        BLOCK_HEADS=block_heads,
        EARLY=early,
        num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )
