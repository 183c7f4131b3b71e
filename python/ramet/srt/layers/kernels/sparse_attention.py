"""Owns attention of each query to rows of the cache that were chosen for it, which are gathered where they lie."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.combine_pieces import LOG2_E, combine
from ramet.srt.layers.kernels.latent_attention import NARROW, head_group, latent_tile
from ramet.srt.layers.kernels.runtime import can_launch_early, dot_precision, next_power_of_2, num_multiprocessors

PIECE_COST = 128  # to begin a piece and to combine it, in keys that a program reads in the time
MOST_PIECES = 32  # of a token's keys


@triton.jit
def _attend(
    acc,
    total,
    maximum,
    q,
    q_rope,
    cache_ptr,
    chosen_ptr,
    cache_stride,
    start,
    stop,
    scale,
    MASKED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_NARROW: tl.constexpr,
):
    """Fold the chosen keys [start, stop) into the running softmax; without MASKED, whole blocks.

    Args:
        acc: [BLOCK_RANK, heads].
        total, maximum: [heads].
        q, q_rope: [BLOCK_RANK or BLOCK_ROPE, heads].
    """
    dims = tl.arange(0, BLOCK_RANK)
    rope_dims = tl.arange(0, BLOCK_ROPE)
    for key in range(start, stop, BLOCK_KEYS):
        places = key + tl.arange(0, BLOCK_KEYS)
        mask = (dims < RANK)[None, :]
        rope_mask = (rope_dims < ROPE)[None, :]
        if MASKED:
            valid = places < stop
            slots = tl.load(chosen_ptr + places, mask=valid, other=0)
            mask = valid[:, None] & mask
            rope_mask = valid[:, None] & rope_mask
        else:
            slots = tl.load(chosen_ptr + places)
        offsets = slots * cache_stride if IS_NARROW else slots.to(tl.int64) * cache_stride
        block = tl.load(cache_ptr + offsets[:, None] + dims[None, :], mask=mask, other=0.0)
        rope_block = tl.load(cache_ptr + RANK + offsets[:, None] + rope_dims[None, :], mask=rope_mask, other=0.0)
        scores = tl.dot(block, q, input_precision=PRECISION)
        scores = tl.dot(rope_block, q_rope, scores, input_precision=PRECISION) * scale
        if MASKED:
            scores = tl.where(valid[:, None], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        probs = tl.exp2(scores - new_maximum[None, :])
        correction = tl.exp2(maximum - new_maximum)
        acc = tl.dot(tl.trans(block), probs.to(block.dtype), acc * correction[None, :], input_precision=PRECISION)
        total = total * correction + tl.sum(probs, axis=0)
        maximum = new_maximum
    return acc, total, maximum


# Positions are a row of what a pass is told at once: they begin anywhere. Pieces depend on the number of tokens.
@triton.jit(do_not_specialize=["num_pieces", "piece_keys"], do_not_specialize_on_alignment=["positions_ptr"])
def _sparse_kernel(
    q_ptr,
    cache_ptr,
    chosen_ptr,
    positions_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    q_stride,
    cache_stride,
    num_heads,
    scale,
    num_pieces,
    piece_keys,
    TOP_K: tl.constexpr,
    HAS_PIECES: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_NARROW: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes `piece_keys` of a token's chosen keys, for GROUP of its heads.

    With several pieces each gives a partial result and the log of the sum of its weights, which is -inf for none.
    """
    num_groups = tl.cdiv(num_heads, GROUP)
    token = (tl.program_id(0) // num_groups).to(tl.int64)
    piece = tl.program_id(1)
    rows = tl.arange(0, BLOCK_ROWS)
    heads = tl.program_id(0) % num_groups * GROUP + rows
    head_mask = (rows < GROUP) & (heads < num_heads)
    dims = tl.arange(0, BLOCK_RANK)
    rope_dims = tl.arange(0, BLOCK_ROPE)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_keys = tl.minimum(tl.load(positions_ptr + token).to(tl.int32) + 1, TOP_K)
    start = piece * piece_keys
    stop = tl.maximum(start, tl.minimum(start + piece_keys, num_keys))
    q_ptrs = q_ptr + token * q_stride + (heads * (RANK + ROPE))[None, :]
    dim_mask = (dims < RANK)[:, None]
    q = tl.load(q_ptrs + dims[:, None], mask=head_mask[None, :] & dim_mask, other=0.0)
    rope_mask = head_mask[None, :] & (rope_dims < ROPE)[:, None]
    q_rope = tl.load(q_ptrs + RANK + rope_dims[:, None], mask=rope_mask, other=0.0)

    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_RANK, BLOCK_ROWS], tl.float32)
    chosen_ptr += token * TOP_K
    whole = start + (stop - start) // BLOCK_KEYS * BLOCK_KEYS
    acc, total, maximum = _attend(
        acc, total, maximum, q, q_rope, cache_ptr, chosen_ptr, cache_stride, start, whole, scale,
        False, RANK, BLOCK_RANK, ROPE, BLOCK_ROPE, BLOCK_KEYS, PRECISION, IS_NARROW,
    )  # fmt: skip
    acc, total, maximum = _attend(
        acc, total, maximum, q, q_rope, cache_ptr, chosen_ptr, cache_stride, whole, stop, scale,
        True, RANK, BLOCK_RANK, ROPE, BLOCK_ROPE, BLOCK_KEYS, PRECISION, IS_NARROW,
    )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # of a piece without keys, whose maximum is -inf
    out = acc / total[None, :]
    if not HAS_PIECES:
        out_ptrs = out_ptr + ((token * num_heads + heads) * RANK)[None, :] + dims[:, None]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=head_mask[None, :] & dim_mask)
    else:
        parts = (token * num_pieces + piece) * num_heads + heads
        has_keys = tl.zeros([BLOCK_ROWS], tl.int32) + start < stop
        mask = (head_mask & has_keys)[None, :] & dim_mask
        tl.store(partial_ptr + (parts * RANK)[None, :] + dims[:, None], out, mask=mask)
        tl.store(lse_ptr + parts, maximum + tl.log2(total), mask=head_mask)


def sparse_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    rank: int,
    chosen: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    num_pieces: int,
    *,
    scale: float,
) -> torch.Tensor:
    """Attention of each token to the rows that were chosen for it.

    Args:
        q: [num_tokens, num_heads, rank + rope_dim], each token contiguous.
        cache: [num_slots, 1, rank + rope_dim], each slot contiguous: keys, whose first `rank` columns are values.
        chosen: contiguous int32 [num_tokens, top_k], slots of the cache, of which as many count as the token sees.
        positions: int64 [num_tokens], the place of each token in its sequence.
        starts: int32 [num_tokens + 1]: 0, num_pieces, 2 * num_pieces, …
        num_pieces: into which a token's keys are cut, see `count_pieces`.

    Returns:
        Contiguous [num_tokens, num_heads, rank].
    """
    num_tokens, num_heads, dim = q.shape
    top_k = chosen.shape[1]
    assert q.stride()[1:] == (dim, 1) and cache.shape[1:] == (1, dim) and cache.stride(2) == 1
    assert chosen.is_contiguous()
    early, group = can_launch_early(q.device), head_group(num_heads, q.dtype)
    tile = latent_tile(q.device, q.dtype, group, is_large=False)
    piece_keys = -(-top_k // (num_pieces * tile.keys)) * tile.keys
    out = torch.empty((num_tokens, num_heads, rank), dtype=q.dtype, device=q.device)
    num_partials = 0 if num_pieces == 1 else num_tokens * num_pieces
    partial = torch.empty((num_partials, num_heads, rank), dtype=torch.float32, device=q.device)
    lse = torch.empty((num_partials, num_heads), dtype=torch.float32, device=q.device)
    _sparse_kernel[(num_tokens * triton.cdiv(num_heads, group), num_pieces)](
        q,
        cache,
        chosen,
        positions,
        out,
        partial,
        lse,
        q.stride(0),
        cache.stride(0),
        num_heads,
        scale * LOG2_E,
        num_pieces,
        piece_keys,
        TOP_K=top_k,
        HAS_PIECES=num_pieces > 1,
        RANK=rank,
        BLOCK_RANK=max(16, next_power_of_2(rank)),
        ROPE=dim - rank,
        BLOCK_ROPE=max(16, next_power_of_2(dim - rank)),
        GROUP=group,
        BLOCK_ROWS=tile.rows,
        BLOCK_KEYS=tile.keys,
        PRECISION=dot_precision(q.dtype),
        IS_NARROW=cache.numel() < NARROW,
        EARLY=early,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **({"launch_pdl": True} if early else {}),
    )
    if num_partials:
        combine(starts, partial, lse, out, group if num_heads % group == 0 else 1)
    return out


def count_pieces(num_tokens: int, num_heads: int, top_k: int, device: torch.device, dtype: torch.dtype) -> int:
    """Pieces of each token's keys with which the multiprocessors end soonest, one program on each at a time."""
    group = head_group(num_heads, dtype)
    keys = latent_tile(device, dtype, group, is_large=False).keys
    programs, slots = num_tokens * -(-num_heads // group), num_multiprocessors(device)
    counts = {-(-top_k // size): size for size in range(keys, top_k + keys, keys) if -(-top_k // size) <= MOST_PIECES}

    def cost(number: int) -> int:
        return -(-programs * number // slots) * (counts[number] + PIECE_COST)

    return min(counts, key=lambda number: (cost(number), number))
