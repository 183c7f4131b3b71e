"""Owns the kernel between the projections of a sparse index and its scores: keys are normed, rotated and stored.

Queries are rotated where they are.
"""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.latent_rows import pair_columns, turn
from ramet.srt.layers.kernels.runtime import can_launch_early, next_power_of_2

HEADS_PER_PROGRAM = 16


@triton.jit
def _normed(x, mean, scale, weight_ptr, bias_ptr, columns, mask):
    """Columns of a key, normed; float32."""
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return (x.to(tl.float32) - mean) * scale * weight + bias


@triton.jit
def _index_rows_kernel(
    keys_ptr,
    q_ptr,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    bias_ptr,
    slots_ptr,
    cache_ptr,
    keys_stride,
    q_stride,
    cache_stride,
    num_heads,
    eps,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The first program of a token takes its key, each other one a few heads of its queries."""
    token = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, BLOCK_HALF)
    pair_mask = pairs < HALF
    firsts, seconds = pair_columns(pairs, HALF, IS_INTERLEAVED)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if tl.program_id(1) == 0:
        key_ptr = keys_ptr + token * keys_stride
        out_ptr = cache_ptr + tl.load(slots_ptr + token).to(tl.int64) * cache_stride
        columns = tl.arange(0, BLOCK_DIM)
        column_mask = columns < DIM
        key = tl.load(key_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        mean = tl.sum(key, axis=0) / DIM
        centred = tl.where(column_mask, key - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / DIM + eps)
        rest_mask = column_mask & (columns >= 2 * HALF)
        rest = _normed(key, mean, scale, weight_ptr, bias_ptr, columns, column_mask)
        tl.store(out_ptr + columns, rest.to(cache_ptr.dtype.element_ty), mask=rest_mask)
        x = tl.load(key_ptr + firsts, mask=pair_mask, other=0.0)
        y = tl.load(key_ptr + seconds, mask=pair_mask, other=0.0)
        x = _normed(x, mean, scale, weight_ptr, bias_ptr, firsts, pair_mask)[None, :]
        y = _normed(y, mean, scale, weight_ptr, bias_ptr, seconds, pair_mask)[None, :]
        x, y = turn(x, y, cos_ptr, sin_ptr, token, pairs, pair_mask, HALF)
        row_mask = pair_mask[None, :]
        tl.store(out_ptr + firsts[None, :], x.to(cache_ptr.dtype.element_ty), mask=row_mask)
        tl.store(out_ptr + seconds[None, :], y.to(cache_ptr.dtype.element_ty), mask=row_mask)
    else:
        heads = (tl.program_id(1) - 1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (heads < num_heads)[:, None] & pair_mask[None, :]
        ptrs = q_ptr + token * q_stride + (heads * DIM)[:, None]
        first = tl.load(ptrs + firsts[None, :], mask=mask, other=0.0)
        second = tl.load(ptrs + seconds[None, :], mask=mask, other=0.0)
        first, second = turn(first, second, cos_ptr, sin_ptr, token, pairs, pair_mask, HALF)
        tl.store(ptrs + firsts[None, :], first.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(ptrs + seconds[None, :], second.to(q_ptr.dtype.element_ty), mask=mask)


def store_index_keys(
    keys: torch.Tensor,
    q: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    slots: torch.Tensor,
    cache: torch.Tensor,
    *,
    is_interleaved: bool,
) -> None:
    """Norm and rotate the tokens' keys and write them to `slots` of the cache, and rotate q in its place.

    Args:
        keys: [num_tokens, head_dim], each contiguous; the first columns rotate.
        q: [num_tokens, num_heads, head_dim], each token contiguous; None if nobody asks.
        cos, sin: contiguous [num_tokens, 1, columns that rotate / 2].
        weight, bias: [head_dim], of the norm.
        slots: int64 [num_tokens].
        cache: [num_slots, head_dim], each slot contiguous.
        is_interleaved: see IndexTraits.
    """
    num_tokens, dim = keys.shape
    half, num_heads = cos.shape[-1], 0 if q is None else q.shape[1]
    assert keys.stride(1) == cache.stride(1) == 1 and (q is None or q.stride()[1:] == (dim, 1))
    early = can_launch_early(keys.device)
    _index_rows_kernel[(num_tokens, 1 + triton.cdiv(num_heads, HEADS_PER_PROGRAM))](
        keys,
        keys if q is None else q,
        cos,
        sin,
        weight,
        bias,
        slots,
        cache,
        keys.stride(0),
        keys.stride(0) if q is None else q.stride(0),
        cache.stride(0),
        num_heads,
        eps,
        DIM=dim,
        BLOCK_DIM=next_power_of_2(dim),
        HALF=half,
        BLOCK_HALF=next_power_of_2(half),
        IS_INTERLEAVED=is_interleaved,
        BLOCK_HEADS=HEADS_PER_PROGRAM,
        EARLY=early,
        num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )
