"""Owns the scores of a sparse index: of each key that a query sees, the weighted sum of what the index's heads say."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.paged_attention import MIN_DOT_ROWS, key_offsets
from ramet.srt.layers.kernels.runtime import can_launch_early, dot_precision, is_interpreted, next_power_of_2

FEW_TOKENS = 16  # up to so many, keys are spread over more programs
KEYS_OF_FEW, KEYS_OF_MANY = 256, 1024  # of a program


# Positions and rows are parts of what a pass is told at once, from any token on: they begin anywhere.
@triton.jit(do_not_specialize=["program_keys"], do_not_specialize_on_alignment=["positions_ptr", "rows_ptr"])
def _scores_kernel(
    q_ptr,
    weights_ptr,
    cache_ptr,
    table_ptr,
    rows_ptr,
    positions_ptr,
    scores_ptr,
    q_stride,
    cache_stride,
    table_stride,
    scores_stride,
    num_heads,
    scale,
    program_keys,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program scores `program_keys` keys for one token; a token that sees no more than TOP_K needs no scores."""
    token = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * program_keys
    heads = tl.arange(0, BLOCK_HEADS)
    dims = tl.arange(0, BLOCK_DIM)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_keys = tl.load(positions_ptr + token).to(tl.int32) + 1
    if num_keys <= TOP_K or start >= num_keys:
        return
    table_ptr += tl.load(rows_ptr + token).to(tl.int64) * table_stride
    head_mask = heads < num_heads
    q_mask = (dims < DIM)[:, None] & head_mask[None, :]
    q = tl.load(q_ptr + token * q_stride + (heads * DIM)[None, :] + dims[:, None], mask=q_mask, other=0.0)
    weights = tl.load(weights_ptr + token * num_heads + heads, mask=head_mask, other=0.0)
    stop = tl.minimum(start + program_keys, num_keys)
    for key in range(start, stop, BLOCK_KEYS):
        positions = key + tl.arange(0, BLOCK_KEYS)
        valid = positions < stop
        offsets = key_offsets(table_ptr, positions, valid, cache_stride, PAGE_SIZE, True)
        mask = valid[:, None] & (dims < DIM)[None, :]
        keys = tl.load(cache_ptr + offsets[:, None] + dims[None, :], mask=mask, other=0.0)
        products = tl.dot(keys, q, input_precision=PRECISION) * scale
        scores = tl.sum(tl.maximum(products, 0.0) * weights[None, :], axis=1)
        tl.store(scores_ptr + token * scores_stride + positions, scores, mask=valid)


def index_scores(
    q: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    scores: torch.Tensor,
    *,
    top_k: int,
    page_size: int,
) -> None:
    """Write the scores of the keys that each token sees, if they are more than `top_k`; others stay as they are.

    Args:
        q: [num_tokens, num_heads, head_dim], each token contiguous.
        weights: contiguous float32 [num_tokens, num_heads].
        cache: [num_slots, head_dim], each slot contiguous: the index's keys.
        table: int64 [num_rows, max_pages].
        rows, positions: int64 [num_tokens], of the table, and in the sequence.
        scores: float32 [num_tokens, at least the keys that any token sees], each row contiguous.
    """
    num_tokens, num_heads, dim = q.shape
    assert q.stride()[1:] == (dim, 1) and weights.is_contiguous() and cache.stride(1) == 1 == table.stride(1)
    early = can_launch_early(q.device)
    program_keys = KEYS_OF_FEW if num_tokens <= FEW_TOKENS else KEYS_OF_MANY
    block_keys = 64 if q.dtype != torch.float32 or is_interpreted() else 32
    _scores_kernel[(num_tokens, triton.cdiv(scores.shape[1], program_keys))](
        q,
        weights,
        cache,
        table,
        rows,
        positions,
        scores,
        q.stride(0),
        cache.stride(0),
        table.stride(0),
        scores.stride(0),
        num_heads,
        dim**-0.5,
        program_keys,
        DIM=dim,
        BLOCK_DIM=max(16, next_power_of_2(dim)),
        BLOCK_HEADS=max(MIN_DOT_ROWS, next_power_of_2(num_heads)),
        TOP_K=top_k,
        BLOCK_KEYS=block_keys,
        PAGE_SIZE=page_size,
        PRECISION=dot_precision(q.dtype),
        EARLY=early,
        num_warps=4,
        num_stages=3,
        **({"launch_pdl": True} if early else {}),
    )
