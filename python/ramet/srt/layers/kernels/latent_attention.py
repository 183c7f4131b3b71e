"""Owns latent attention over the paged KV cache: pieces as of paged_attention, whose keys' first columns are values."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.combine_pieces import LOG2_E, combine
from ramet.srt.layers.kernels.paged_attention import (
    MIN_DOT_ROWS,
    PieceLists,
    TileShape,
    end_of_open_keys,
    key_offsets,
    load_piece,
)
from ramet.srt.layers.kernels.runtime import (
    can_launch_early,
    dot_precision,
    has_large_shared_memory,
    is_interpreted,
    next_power_of_2,
)

MOST_HEADS = 32  # that share a tile, so that its sums of 512 columns fit into the registers of four warps
NARROW = 2**31  # numbers of a layer's cache up to which offsets take half the registers
PROGRAMS = 1  # with such a tile that a multiprocessor runs at a time


@triton.jit
def _attend(
    acc,
    total,
    maximum,
    q,
    q_rope,
    q_positions,
    cache_ptr,
    table_ptr,
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
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_NARROW: tl.constexpr,
):
    """Fold the keys [start, stop) into the running softmax; without MASKED, whole blocks that every query sees.

    A block is read once: its first RANK columns are a part of the keys, and the values. Keys, and then columns of
    values, are the rows of the products: the matrix units take 64 of these at a time, and may find few heads.

    Args:
        acc: [BLOCK_RANK, queries].
        total, maximum: [queries].
        q, q_rope: [BLOCK_RANK or BLOCK_ROPE, queries].
    """
    dims = tl.arange(0, BLOCK_RANK)
    rope_dims = tl.arange(0, BLOCK_ROPE)
    for key in range(start, stop, BLOCK_KEYS):
        positions = key + tl.arange(0, BLOCK_KEYS)
        valid = positions < stop
        offsets = key_offsets(table_ptr, positions, valid, cache_stride, PAGE_SIZE, MASKED)
        if IS_NARROW:
            offsets = offsets.to(tl.int32)
        mask = (dims < RANK)[None, :]
        rope_mask = (rope_dims < ROPE)[None, :]
        if MASKED:
            mask = valid[:, None] & mask
            rope_mask = valid[:, None] & rope_mask
        block = tl.load(cache_ptr + offsets[:, None] + dims[None, :], mask=mask, other=0.0)
        rope_block = tl.load(cache_ptr + RANK + offsets[:, None] + rope_dims[None, :], mask=rope_mask, other=0.0)
        scores = tl.dot(block, q, input_precision=PRECISION)
        scores = tl.dot(rope_block, q_rope, scores, input_precision=PRECISION) * scale
        if MASKED:
            visible = valid[:, None] & (positions[:, None] <= q_positions[None, :])
            scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        shift = new_maximum
        if MASKED:
            # A row that has seen no key yet keeps -inf; subtracting 0 instead gives it probabilities of 0, not NaN.
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        probs = tl.exp2(scores - shift[None, :])
        correction = tl.exp2(maximum - shift)
        acc = tl.dot(tl.trans(block), probs.to(block.dtype), acc * correction[None, :], input_precision=PRECISION)
        total = total * correction + tl.sum(probs, axis=0)
        maximum = new_maximum
    return acc, total, maximum


# Positions are a row of what a pass is told at once: they begin anywhere.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _piece_kernel(
    q_ptr,
    cache_ptr,
    table_ptr,
    positions_ptr,
    pieces_ptr,
    starts_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    q_stride,
    cache_stride,
    table_stride,
    num_heads,
    scale,
    PIECE_FIELDS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_NARROW: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes one piece, for GROUP heads: query i is head i % GROUP of them, of token i // GROUP.

    Keys that all rows see are taken without masks. A token's partial result, with the log of the sum of its weights,
    goes to the place that `starts` gives; the result of a token in one piece alone goes out.
    """
    num_groups = tl.cdiv(num_heads, GROUP)
    piece_ptr = pieces_ptr + tl.program_id(0) // num_groups * PIECE_FIELDS
    rows = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_RANK)
    rope_dims = tl.arange(0, BLOCK_ROPE)
    num_tokens = tl.load(piece_ptr + 2)
    # As in paged_attention: programs with nothing to do make room at once, but for one.
    if (num_tokens == 0) & (tl.program_id(0) > 0):
        return
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if num_tokens == 0:
        return
    row, tokens, start, stop, place = load_piece(piece_ptr)
    tokens += rows // GROUP
    heads = tl.program_id(0) % num_groups * GROUP + rows % GROUP
    row_mask = (rows // GROUP < num_tokens) & (heads < num_heads)
    q_positions = tl.load(positions_ptr + tokens, mask=row_mask, other=-1).to(tl.int32)
    q_ptrs = q_ptr + (tokens * q_stride + heads * (RANK + ROPE))[None, :]
    dim_mask = (dims < RANK)[:, None]
    q = tl.load(q_ptrs + dims[:, None], mask=row_mask[None, :] & dim_mask, other=0.0)
    rope_mask = row_mask[None, :] & (rope_dims < ROPE)[:, None]
    q_rope = tl.load(q_ptrs + RANK + rope_dims[:, None], mask=rope_mask, other=0.0)

    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_RANK, BLOCK_ROWS], tl.float32)
    table_ptr += row * table_stride
    open_stop = end_of_open_keys(start, stop, q_positions, row_mask, BLOCK_KEYS)
    acc, total, maximum = _attend(
        acc, total, maximum, q, q_rope, q_positions, cache_ptr, table_ptr, cache_stride, start, open_stop, scale,
        False, RANK, BLOCK_RANK, ROPE, BLOCK_ROPE, BLOCK_KEYS, PAGE_SIZE, PRECISION, IS_NARROW,
    )  # fmt: skip
    acc, total, maximum = _attend(
        acc, total, maximum, q, q_rope, q_positions, cache_ptr, table_ptr, cache_stride, open_stop, stop, scale,
        True, RANK, BLOCK_RANK, ROPE, BLOCK_ROPE, BLOCK_KEYS, PAGE_SIZE, PRECISION, IS_NARROW,
    )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # of a row that sees none of these keys: its maximum is -inf
    out = acc / total[None, :]
    first_part = tl.load(starts_ptr + tokens, mask=row_mask, other=0)
    is_part = first_part < tl.load(starts_ptr + tokens + 1, mask=row_mask, other=0)
    out_ptrs = out_ptr + ((tokens * num_heads + heads) * RANK)[None, :] + dims[:, None]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(row_mask & ~is_part)[None, :] & dim_mask)
    parts = (first_part + place).to(tl.int64) * num_heads + heads
    tl.store(partial_ptr + (parts * RANK)[None, :] + dims[:, None], out, mask=is_part[None, :] & dim_mask)
    tl.store(lse_ptr + parts, maximum + tl.log2(total), mask=is_part)


def latent_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    rank: int,
    table: torch.Tensor,
    positions: torch.Tensor,
    pieces: PieceLists,
    small: TileShape,
    large: TileShape,
    *,
    group: int,
    page_size: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention of the new tokens of a pass, whose rows are in the cache, to all that they see.

    Args:
        q: [num_tokens, num_heads, rank + rope_dim], each token contiguous.
        cache: [num_slots, 1, rank + rope_dim], each slot contiguous: keys, whose first `rank` columns are values.
        table, positions, pieces: as of `paged_attention`.
        group: heads of a tile, see `head_group`.

    Returns:
        Contiguous [num_tokens, num_heads, rank].
    """
    num_tokens, num_heads, dim = q.shape
    assert q.stride()[1:] == (dim, 1) and cache.shape[1:] == (1, dim) and cache.stride(2) == 1 == table.stride(1)
    early = can_launch_early(q.device)
    out = torch.empty((num_tokens, num_heads, rank), dtype=q.dtype, device=q.device)
    # Of the same type with and without partial results: the kernels are compiled anew for another.
    partial = torch.empty((pieces.num_partials, num_heads, rank), dtype=torch.float32, device=q.device)
    lse = torch.empty((pieces.num_partials, num_heads), dtype=torch.float32, device=q.device)
    for listed, tile in ((pieces.small, small), (pieces.large, large)):
        if len(listed) == 0:
            continue
        _piece_kernel[(len(listed) * triton.cdiv(num_heads, group),)](
            q,
            cache,
            table,
            positions,
            listed,
            pieces.starts,
            out,
            partial,
            lse,
            q.stride(0),
            cache.stride(0),
            table.stride(0),
            num_heads,
            scale * LOG2_E,
            PIECE_FIELDS=listed.shape[1],
            RANK=rank,
            BLOCK_RANK=max(16, next_power_of_2(rank)),
            ROPE=dim - rank,
            BLOCK_ROPE=max(16, next_power_of_2(dim - rank)),
            GROUP=group,
            BLOCK_ROWS=tile.rows,
            BLOCK_KEYS=tile.keys,
            PAGE_SIZE=page_size,
            PRECISION=dot_precision(q.dtype),
            IS_NARROW=cache.numel() < NARROW,
            EARLY=early,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **({"launch_pdl": True} if early else {}),
        )
    if pieces.num_partials:
        combine(pieces.starts, partial, lse, out, group if num_heads % group == 0 else 1)
    return out


def head_group(num_heads: int, dtype: torch.dtype) -> int:
    """Heads that share a tile: as many as its rows, or all in equal parts where there are more."""
    most = MIN_DOT_ROWS if dtype == torch.float32 else MOST_HEADS
    return -(-num_heads // -(-num_heads // most))


def latent_tile(device: torch.device, dtype: torch.dtype, group: int, *, is_large: bool) -> TileShape:
    """For sequences with few new tokens, or for prompt chunks, of which several tokens share a tile of few heads."""
    rows = max(MIN_DOT_ROWS, next_power_of_2(group))
    if dtype == torch.float32 and not is_interpreted():
        return TileShape(rows, 16, 4, 1)
    rows = MOST_HEADS if is_large else rows
    if is_interpreted():
        return TileShape(rows, 16, 4, 1)
    if not has_large_shared_memory(device):
        return TileShape(rows, 32, 8 if rows > MIN_DOT_ROWS else 4, 2)
    # The third stage reads the pages of keys ahead; blocks of keys have room for two.
    return TileShape(rows, 64, 4, 3)
