"""Owns attention over the paged KV cache: pieces, each a tile of queries and a range of keys, and their combination."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.combine_pieces import LOG2, LOG2_E, combine
from ramet.srt.layers.kernels.prefetch import prefetch_sectors
from ramet.srt.layers.kernels.runtime import (
    can_launch_early,
    dot_precision,
    is_interpreted,
    next_power_of_2,
)

MIN_DOT_ROWS = 16  # the least that the matrix units take
NO_WINDOW = 2**30
PREFETCH_TOKENS = 8  # so few don't keep the memory busy: their first keys come into the L2 cache while q is made
NO_LIMIT = tl.constexpr(2**30)


@triton.jit
def key_offsets(
    table_ptr, positions, valid, cache_stride, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr,
    map_ptr=None, HAS_MAP: tl.constexpr = False,
):  # fmt: skip
    """Where the keys at `positions` of a sequence start in the cache; its pages are listed at `table_ptr`."""
    if MASKED:
        pages = tl.load(table_ptr + positions // PAGE_SIZE, mask=valid, other=0)
    else:
        pages = tl.load(table_ptr + positions // PAGE_SIZE)
    if HAS_MAP:
        pages = tl.load(map_ptr + pages)
    return (pages * PAGE_SIZE + positions % PAGE_SIZE) * cache_stride


@triton.jit
def _fold_block(
    acc, total, maximum, scores, v_ptrs, v_mask, DTYPE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr
):
    """A block of scores and values in a running softmax (Milakov and Gimelshein, 2018).

    Args:
        acc, total, maximum: the weighted sum of the values so far, the sum of the weights, the highest score.
        scores: [rows, keys] in base 2; -inf hides a key.
        DTYPE: in which weights and values are multiplied.
        MASKED: whether a row may have seen no key at all so far.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    shift = new_maximum
    if MASKED:
        # A row that has seen no key yet keeps -inf; subtracting 0 instead gives it probabilities of 0, not NaN.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    probs = tl.exp2(scores - shift[:, None])
    correction = tl.exp2(maximum - shift)
    v = tl.load(v_ptrs, mask=v_mask, other=0.0).to(DTYPE)
    acc = tl.dot(probs.to(DTYPE), v, acc * correction[:, None], input_precision=PRECISION)
    return acc, total * correction + tl.sum(probs, axis=1), new_maximum


@triton.jit
def _attend(
    acc,
    total,
    maximum,
    q,
    q_positions,
    k_ptr,
    v_ptr,
    table_ptr,
    map_ptr,
    cache_stride,
    start,
    stop,
    scale,
    window,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_MAP: tl.constexpr,
):
    """Fold the keys [start, stop) into the running softmax; without MASKED, whole blocks that every query sees."""
    dims = tl.arange(0, BLOCK_DIM)
    dim_mask = dims < HEAD_DIM
    for key in range(start, stop, BLOCK_KEYS):
        positions = key + tl.arange(0, BLOCK_KEYS)
        valid = positions < stop
        slots = key_offsets(table_ptr, positions, valid, cache_stride, PAGE_SIZE, MASKED, map_ptr, HAS_MAP)
        k_mask = valid[None, :] & dim_mask[:, None] if MASKED else dim_mask[:, None]
        k = tl.load(k_ptr + slots[None, :] + dims[:, None], mask=k_mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        if SOFT_CAP > 0:
            scores = SOFT_CAP * (2 * tl.sigmoid(2 * scores / SOFT_CAP) - 1)  # SOFT_CAP * tanh(scores / SOFT_CAP)
        if MASKED:
            visible = valid[None, :] & (positions[None, :] <= q_positions[:, None])
            if HAS_WINDOW:
                visible = visible & (positions[None, :] > q_positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        v_ptrs = v_ptr + slots[:, None] + dims[None, :]
        v_mask = valid[:, None] & dim_mask[None, :] if MASKED else dim_mask[None, :]
        acc, total, maximum = _fold_block(acc, total, maximum, scores, v_ptrs, v_mask, q.dtype, PRECISION, MASKED)
    return acc, total, maximum


@triton.jit
def load_piece(piece_ptr):
    """Row of the table, first token, keys [start, stop), and place of a piece among those of its tokens."""
    row, token = tl.load(piece_ptr).to(tl.int64), tl.load(piece_ptr + 1).to(tl.int64)
    return row, token, tl.load(piece_ptr + 3), tl.load(piece_ptr + 4), tl.load(piece_ptr + 5)


@triton.jit
def _prefetch_keys(
    k_ptr, v_ptr, table_ptr, map_ptr, cache_stride, start, stop, HEAD_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HAS_MAP: tl.constexpr,
):  # fmt: skip
    """The first BLOCK_KEYS keys and values of [start, stop), or what is there in place of those being made."""
    SECTOR: tl.constexpr = 256 // k_ptr.dtype.element_ty.primitive_bitwidth
    NUM: tl.constexpr = HEAD_DIM // SECTOR
    positions = tl.maximum(tl.minimum(start + tl.arange(0, BLOCK_KEYS), stop - 1), 0)
    slots = key_offsets(table_ptr, positions, None, cache_stride, PAGE_SIZE, False, map_ptr, HAS_MAP)
    sectors = slots[:, None] + (tl.arange(0, NUM) * SECTOR)[None, :]
    prefetch_sectors(k_ptr + sectors)
    prefetch_sectors(v_ptr + sectors)


@triton.jit
def end_of_open_keys(start, stop, q_positions, row_mask, BLOCK_KEYS: tl.constexpr):
    """Up to where, in whole blocks from `start` on, all rows see all keys."""
    seen_by_all = tl.minimum(stop, tl.min(tl.where(row_mask, q_positions, NO_LIMIT), axis=0) + 1)
    return start + tl.maximum(0, seen_by_all - start) // BLOCK_KEYS * BLOCK_KEYS


# Positions are a row of what a pass is told at once: they begin anywhere.
@triton.jit(do_not_specialize=["table_stride", "window"], do_not_specialize_on_alignment=["positions_ptr"])
def _piece_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    map_ptr,
    positions_ptr,
    pieces_ptr,
    starts_ptr,
    scales_ptr,
    sinks_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    q_stride,
    cache_stride,
    table_stride,
    num_heads,
    scale,
    window,
    PIECE_FIELDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_OPEN_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    PREFETCHES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes one piece, for the query heads of one KV head: row i is head i % GROUP of token i // GROUP.

    With HAS_OPEN_KEYS, keys that all rows see are taken without masks. A token's partial result, with the log of the
    sum of its weights, goes to the place that `starts` gives; the result of a token in one piece alone goes out.
    """
    num_kv_heads = num_heads // GROUP
    kv_head = tl.program_id(0) % num_kv_heads
    piece_ptr = pieces_ptr + tl.program_id(0) // num_kv_heads * PIECE_FIELDS
    rows = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    dim_mask = dims < HEAD_DIM
    if HAS_SCALES:
        scale *= tl.load(scales_ptr)
    # The host tells of pieces and positions before a pass: they are there before the wait for q.
    num_tokens = tl.load(piece_ptr + 2)
    row, tokens, start, stop, place = load_piece(piece_ptr)
    tokens += rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    row_mask = rows // GROUP < num_tokens
    q_positions = tl.load(positions_ptr + tokens, mask=row_mask, other=-1).to(tl.int32)
    first_part = tl.load(starts_ptr + tokens, mask=row_mask, other=0)
    is_part = first_part < tl.load(starts_ptr + tokens + 1, mask=row_mask, other=0)
    # Most programs of a captured pass have nothing to do: those make room at once. One waits in any case, or kernels
    # that wait for this one would not wait for those before it.
    if (num_tokens == 0) & (tl.program_id(0) > 0):
        return
    k_ptr = k_cache_ptr + kv_head * HEAD_DIM
    v_ptr = v_cache_ptr + kv_head * HEAD_DIM
    table_ptr += row * table_stride
    if PREFETCHES:
        _prefetch_keys(
            k_ptr, v_ptr, table_ptr, map_ptr, cache_stride, start, stop, HEAD_DIM, BLOCK_KEYS, PAGE_SIZE, HAS_MAP
        )
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if num_tokens == 0:
        return
    q_offsets = tokens[:, None] * q_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=row_mask[:, None] & dim_mask[None, :], other=0.0)

    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    if HAS_OPEN_KEYS:
        open_stop = end_of_open_keys(start, stop, q_positions, row_mask, BLOCK_KEYS)
        acc, total, maximum = _attend(
            acc, total, maximum, q, q_positions, k_ptr, v_ptr, table_ptr, map_ptr, cache_stride, start, open_stop,
            scale, window, False, False, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, PAGE_SIZE, PRECISION, SOFT_CAP, HAS_MAP,
        )  # fmt: skip
        start = open_stop
    acc, total, maximum = _attend(
        acc, total, maximum, q, q_positions, k_ptr, v_ptr, table_ptr, map_ptr, cache_stride, start, stop, scale,
        window, True, HAS_WINDOW, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, PAGE_SIZE, PRECISION, SOFT_CAP, HAS_MAP,
    )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # of a row that sees none of these keys: its maximum is -inf
    out = acc / total[:, None]
    if HAS_SCALES:
        out *= tl.load(scales_ptr + 1)
    if HAS_SINKS:
        sinks = tl.load(sinks_ptr + heads, mask=row_mask, other=0.0).to(tl.float32) * LOG2
        weights = tl.where(row_mask & ~is_part, tl.exp2(sinks - maximum), 0.0)  # of a part, once for all in the end
        out *= (total / (total + weights))[:, None]
    out_offsets = (tokens * num_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
    whole_mask = (row_mask & ~is_part)[:, None] & dim_mask[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=whole_mask)
    parts = (first_part + place).to(tl.int64) * num_heads + heads
    part_mask = is_part[:, None] & dim_mask[None, :]
    tl.store(partial_ptr + parts[:, None] * HEAD_DIM + dims[None, :], out, mask=part_mask)
    tl.store(lse_ptr + parts, maximum + tl.log2(total), mask=is_part)


class TileShape(NamedTuple):
    """How a program works on its piece."""

    rows: int  # of queries
    keys: int  # in one step
    num_warps: int
    num_stages: int


class PieceLists(NamedTuple):
    """The pieces of a pass on the device; see KeySplits."""

    small: torch.Tensor  # int32 [num_pieces, PIECE_FIELDS]; those of no tokens are skipped
    large: torch.Tensor  # the same
    starts: torch.Tensor  # int32 [num_tokens + 1]
    num_partials: int  # the most that `starts` ends with


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    pieces: PieceLists,
    small: TileShape,
    large: TileShape,
    *,
    page_size: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None = None,
    kv_scales: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    page_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the new tokens of a pass, whose keys and values are in the cache, to all that they see.

    Args:
        q: [num_tokens, num_heads, head_dim], each row contiguous.
        k_cache, v_cache: [num_slots, num_kv_heads, head_dim], each slot contiguous, like q or float8_e4m3fn.
        table: int64 [num_rows, max_pages], pages of each row.
        positions: int64 [num_tokens], of each token in its sequence.
        soft_cap: see AttentionSpec.
        kv_scales, sinks: see AttentionLayer.
        page_map: int64, where in the cache the pages of the table are; None: there.

    Returns:
        Contiguous [num_tokens, num_heads, head_dim].
    """
    _, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    assert q.stride()[1:] == (head_dim, 1) and k_cache.stride() == v_cache.stride()
    assert k_cache.stride()[1:] == (head_dim, 1) and table.stride(1) == 1
    early = can_launch_early(q.device)
    launch = {"launch_pdl": True} if early else {}
    block_dim = max(16, next_power_of_2(head_dim))
    prefetches = early and len(q) <= PREFETCH_TOKENS and block_dim == head_dim >= 32
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Of the same type with and without partial results: the kernels are compiled anew for another.
    partial = torch.empty((pieces.num_partials, num_heads, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((pieces.num_partials, num_heads), dtype=torch.float32, device=q.device)
    for listed, tile, has_open_keys in ((pieces.small, small, False), (pieces.large, large, sliding_window is None)):
        if len(listed) == 0:
            continue
        _piece_kernel[(num_kv_heads * len(listed),)](
            q,
            k_cache,
            v_cache,
            table,
            table if page_map is None else page_map,
            positions,
            listed,
            pieces.starts,
            pieces.starts if kv_scales is None else kv_scales,
            q if sinks is None else sinks,
            out,
            partial,
            lse,
            q.stride(0),
            k_cache.stride(0),
            table.stride(0),
            num_heads,
            scale * LOG2_E,
            sliding_window if sliding_window is not None else NO_WINDOW,
            PIECE_FIELDS=listed.shape[1],
            HEAD_DIM=head_dim,
            BLOCK_DIM=block_dim,
            GROUP=num_heads // num_kv_heads,
            BLOCK_ROWS=tile.rows,
            BLOCK_KEYS=tile.keys,
            PAGE_SIZE=page_size,
            HAS_WINDOW=sliding_window is not None,
            HAS_OPEN_KEYS=has_open_keys,
            PRECISION=dot_precision(q.dtype),
            SOFT_CAP=(soft_cap or 0.0) * LOG2_E,
            HAS_SCALES=kv_scales is not None,
            HAS_SINKS=sinks is not None,
            HAS_MAP=page_map is not None,
            PREFETCHES=prefetches,
            EARLY=early,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **launch,
        )
    if pieces.num_partials:
        combine(pieces.starts, partial, lse, out, num_heads // num_kv_heads, sinks)
    return out


def small_tile(dtype: torch.dtype, head_dim: int, group: int) -> TileShape:
    """For sequences with few new tokens: bound by memory."""
    rows = max(MIN_DOT_ROWS, next_power_of_2(group))
    if is_interpreted():
        return TileShape(rows, 16, 4, 1)
    if dtype == torch.float32:
        return TileShape(rows, 32, 4, 1)
    return TileShape(rows, 64 if head_dim > 128 else 128, 4, 2)


def large_tile(dtype: torch.dtype, head_dim: int, group: int) -> TileShape:
    """For prompt chunks: bound by the matrix units."""
    least = max(MIN_DOT_ROWS, next_power_of_2(group))
    if is_interpreted():
        return TileShape(max(32, least), 16, 4, 1)
    if dtype == torch.float32:
        return TileShape(max(32, least), 32, 4, 1)
    if head_dim > 128:
        return TileShape(max(64, least), 64, 4, 2)
    return TileShape(max(128, least), 64, 4, 3)
