"""Owns causal attention of prompt chunks over keys and values that latent rows were expanded to, some heads at a time.

For many new tokens that is less work than attention over rows: a head's keys and values have fewer columns.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ramet.srt.configs.latent_config import LatentTraits
from ramet.srt.layers.kernels.combine_pieces import LOG2_E
from ramet.srt.layers.kernels.paged_attention import TileShape
from ramet.srt.layers.kernels.runtime import (
    can_launch_early,
    dot_precision,
    has_large_shared_memory,
    is_interpreted,
    next_power_of_2,
)

TILE_FIELDS = 5  # first token of the pass, number of tokens, first key, keys that the last one sees, first position
WIDE = 256  # columns of keys and values


class HeadRange(NamedTuple):
    """Some of a rank's heads."""

    first: int
    number: int


@triton.jit
def _attend(
    acc,
    total,
    maximum,
    q,
    q_rope,
    q_positions,
    kv_ptr,
    rows_ptr,
    kv_stride,
    rows_stride,
    start,
    stop,
    scale,
    MASKED: tl.constexpr,
    NOPE: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold the keys [start, stop) into the running softmax; without MASKED, whole blocks that every query sees."""
    dims = tl.arange(0, BLOCK_NOPE)
    rope_dims = tl.arange(0, BLOCK_ROPE)
    value_dims = tl.arange(0, BLOCK_VALUE)
    for first in range(start, stop, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        mask = (dims < NOPE)[:, None]
        rope_mask = (rope_dims < ROPE)[:, None]
        value_mask = (value_dims < VALUE)[None, :]
        if MASKED:
            valid = keys < stop
            mask = mask & valid[None, :]
            rope_mask = rope_mask & valid[None, :]
            value_mask = value_mask & valid[:, None]
        places = keys.to(tl.int64)
        k = tl.load(kv_ptr + (places * kv_stride)[None, :] + dims[:, None], mask=mask, other=0.0)
        k_rope = tl.load(rows_ptr + (places * rows_stride)[None, :] + rope_dims[:, None], mask=rope_mask, other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION)
        scores = tl.dot(q_rope, k_rope, scores, input_precision=PRECISION) * scale
        if MASKED:
            scores = tl.where(valid[None, :] & (keys[None, :] <= q_positions[:, None]), scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        probs = tl.exp2(scores - new_maximum[:, None])  # the first block has a key for every query
        correction = tl.exp2(maximum - new_maximum)
        v_ptrs = kv_ptr + NOPE + (places * kv_stride)[:, None] + value_dims[None, :]
        v = tl.load(v_ptrs, mask=value_mask, other=0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
        total = total * correction + tl.sum(probs, axis=1)
        maximum = new_maximum
    return acc, total, maximum


@triton.jit(do_not_specialize=["first_head"])
def _expanded_kernel(
    q_ptr,
    kv_ptr,
    rows_ptr,
    tiles_ptr,
    out_ptr,
    q_stride,
    kv_stride,
    rows_stride,
    out_stride,
    first_head,
    scale,
    TILE_FIELDS: tl.constexpr,
    RANK: tl.constexpr,
    NOPE: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes a tile of tokens of one sequence, for one head. Keys that all see are taken without masks."""
    tile_ptr = tiles_ptr + tl.program_id(0) * TILE_FIELDS
    head = tl.program_id(1).to(tl.int64)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.arange(0, BLOCK_ROWS)
    row_mask = rows < tl.load(tile_ptr + 1)
    tokens = tl.load(tile_ptr).to(tl.int64) + rows
    first_key = tl.load(tile_ptr + 2).to(tl.int64)
    num_keys = tl.load(tile_ptr + 3)
    position = tl.load(tile_ptr + 4)
    dims = tl.arange(0, BLOCK_NOPE)
    rope_dims = tl.arange(0, BLOCK_ROPE)
    value_dims = tl.arange(0, BLOCK_VALUE)
    q_ptrs = q_ptr + (tokens * q_stride + (first_head + head) * (NOPE + ROPE))[:, None]
    q = tl.load(q_ptrs + dims[None, :], mask=row_mask[:, None] & (dims < NOPE)[None, :], other=0.0)
    rope_mask = row_mask[:, None] & (rope_dims < ROPE)[None, :]
    q_rope = tl.load(q_ptrs + NOPE + rope_dims[None, :], mask=rope_mask, other=0.0)
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    kv_ptr += first_key * kv_stride + head * (NOPE + VALUE)
    rows_ptr += first_key * rows_stride + RANK
    open_stop = (position + 1) // BLOCK_KEYS * BLOCK_KEYS
    acc, total, maximum = _attend(
        acc, total, maximum, q, q_rope, position + rows, kv_ptr, rows_ptr, kv_stride, rows_stride, 0, open_stop,
        scale, False, NOPE, BLOCK_NOPE, ROPE, BLOCK_ROPE, VALUE, BLOCK_VALUE, BLOCK_KEYS, PRECISION,
    )  # fmt: skip
    acc, total, maximum = _attend(
        acc, total, maximum, q, q_rope, position + rows, kv_ptr, rows_ptr, kv_stride, rows_stride, open_stop, num_keys,
        scale, True, NOPE, BLOCK_NOPE, ROPE, BLOCK_ROPE, VALUE, BLOCK_VALUE, BLOCK_KEYS, PRECISION,
    )  # fmt: skip
    out_ptrs = out_ptr + (tokens * out_stride + (first_head + head) * VALUE)[:, None] + value_dims[None, :]
    mask = row_mask[:, None] & (value_dims < VALUE)[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def expanded_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    rows: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    heads: HeadRange,
    latent: LatentTraits,
    scale: float,
) -> None:
    """Write what some heads of the tiles' tokens give.

    Args:
        q: [num_tokens, all heads, query_dim], rotated; each token contiguous, as in out.
        kv: contiguous [num_keys, number of these heads, nope_dim + value_dim].
        rows: contiguous [num_keys, row_dim], of which the columns that rotate are read.
        tiles: int32 [num_tiles, TILE_FIELDS]; see `expanded_tile` for their size.
        out: [num_tokens, all heads, value_dim].
    """
    nope, rope, value = latent.nope_dim, latent.rope_dim, latent.value_dim
    assert q.stride()[1:] == (nope + rope, 1) and out.stride()[1:] == (value, 1)
    assert kv.is_contiguous() and rows.is_contiguous()
    tile = expanded_tile(q.device, latent)
    early = can_launch_early(q.device)
    _expanded_kernel[(len(tiles), heads.number)](
        q,
        kv,
        rows,
        tiles,
        out,
        q.stride(0),
        kv.stride(0),
        rows.stride(0),
        out.stride(0),
        heads.first,
        scale * LOG2_E,
        TILE_FIELDS=TILE_FIELDS,
        RANK=latent.kv_rank,
        NOPE=nope,
        BLOCK_NOPE=max(16, next_power_of_2(nope)),
        ROPE=rope,
        BLOCK_ROPE=max(16, next_power_of_2(rope)),
        VALUE=value,
        BLOCK_VALUE=max(16, next_power_of_2(value)),
        BLOCK_ROWS=tile.rows,
        BLOCK_KEYS=tile.keys,
        PRECISION=dot_precision(q.dtype),
        EARLY=early,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **({"launch_pdl": True} if early else {}),
    )


def expanded_tile(device: torch.device, latent: LatentTraits) -> TileShape:
    """Tokens of a tile, and keys of a step."""
    if is_interpreted():
        return TileShape(16, 16, 4, 1)
    if not has_large_shared_memory(device):
        return TileShape(64, 32, 4, 2)
    is_wide = next_power_of_2(latent.nope_dim) + next_power_of_2(latent.value_dim) > WIDE
    return TileShape(128, 64, 8, 2 if is_wide else 3)  # as many blocks of keys as shared memory holds
