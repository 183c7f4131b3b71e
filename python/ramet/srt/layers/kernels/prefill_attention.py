"""Owns prefill attention over the paged KV cache: a ragged batch of new tokens, each sequence behind its prefix."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.paged_softmax import LOG2_E, fold_block, key_offsets
from ramet.srt.layers.kernels.runtime import dot_precision, is_interpreted, next_power_of_2


@triton.jit
def _attend_keys(
    acc,
    total,
    maximum,
    q,
    q_positions,
    k_ptr,
    v_ptr,
    table_ptr,
    cache_stride,
    start,
    stop,
    seq_len,
    scale,
    window,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold the keys [start, stop) into the running softmax; without MASKED every query sees all of them."""
    dims = tl.arange(0, BLOCK_DIM)
    dim_mask = dims < HEAD_DIM
    for key in range(start, stop, BLOCK_KEYS):
        positions = key + tl.arange(0, BLOCK_KEYS)
        valid = positions < seq_len if MASKED else positions >= 0
        slots = key_offsets(table_ptr, positions, valid, cache_stride, PAGE_SIZE, MASKED)
        k = tl.load(k_ptr + slots[None, :] + dims[:, None], mask=valid[None, :] & dim_mask[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        if MASKED:
            visible = (positions[None, :] <= q_positions[:, None]) & (
                positions[None, :] > q_positions[:, None] - window
            )
            scores = tl.where(visible, scores, float("-inf"))
        v_ptrs, v_mask = v_ptr + slots[:, None] + dims[None, :], valid[:, None] & dim_mask[None, :]
        acc, total, maximum = fold_block(acc, total, maximum, scores, v_ptrs, v_mask, PRECISION, True)
    return acc, total, maximum


@triton.jit(do_not_specialize=["table_stride", "window"])
def _prefill_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    starts_ptr,
    seq_lens_ptr,
    out_ptr,
    q_stride,
    cache_stride,
    table_stride,
    num_heads,
    scale,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program attends with one head of BLOCK_QUERIES new tokens of one sequence (Dao, 2023)."""
    sequence = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    first_query = tl.load(starts_ptr + sequence)
    num_queries = tl.load(starts_ptr + sequence + 1) - first_query
    block_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_QUERIES  # the longest rows first
    if block_start >= num_queries:
        return
    seq_len = tl.load(seq_lens_ptr + sequence)
    prefix_len = seq_len - num_queries
    rows = block_start + tl.arange(0, BLOCK_QUERIES)
    row_mask = rows < num_queries
    q_positions = prefix_len + rows
    dims = tl.arange(0, BLOCK_DIM)
    dim_mask = dims < HEAD_DIM
    tokens = (first_query + rows).to(tl.int64)
    q_offsets = tokens[:, None] * q_stride + head * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=row_mask[:, None] & dim_mask[None, :], other=0.0)

    maximum = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    acc = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)
    kv_head = head // GROUP
    k_ptr = k_cache_ptr + kv_head * HEAD_DIM
    v_ptr = v_cache_ptr + kv_head * HEAD_DIM
    table_ptr = block_tables_ptr + sequence * table_stride
    last = tl.minimum(prefix_len + block_start + BLOCK_QUERIES, seq_len)  # behind the last key that is visible here
    if HAS_WINDOW:
        masked_start = tl.maximum(0, prefix_len + block_start - window + 1) // BLOCK_KEYS * BLOCK_KEYS
    else:
        masked_start = (prefix_len + block_start + 1) // BLOCK_KEYS * BLOCK_KEYS  # all rows see every key before it
        acc, total, maximum = _attend_keys(
            acc, total, maximum, q, q_positions, k_ptr, v_ptr, table_ptr, cache_stride, 0, masked_start, seq_len,
            scale, window, False, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, PAGE_SIZE, PRECISION,
        )  # fmt: skip
    acc, total, maximum = _attend_keys(
        acc, total, maximum, q, q_positions, k_ptr, v_ptr, table_ptr, cache_stride, masked_start, last, seq_len,
        scale, window, True, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, PAGE_SIZE, PRECISION,
    )  # fmt: skip
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_offsets = (tokens[:, None] * num_heads + head) * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & dim_mask[None, :])


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    starts: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    max_queries: int,
    page_size: int,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens, whose keys and values are in the cache, to it and its prefix.

    Args:
        q: [num_tokens, num_heads, head_dim], each row contiguous; the sequences stand one behind the other.
        k_cache, v_cache: [num_slots, num_kv_heads, head_dim], each slot contiguous.
        block_tables: integer [batch_size, max_pages].
        starts: int32 [batch_size + 1]: where each sequence's new tokens start, and the end of the last.
        seq_lens: int32 [batch_size], prefix and new tokens.
        max_queries: the most new tokens of a sequence.

    Returns:
        Contiguous [num_tokens, num_heads, head_dim].
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[1]
    assert q.stride()[1:] == (head_dim, 1) and k_cache.stride() == v_cache.stride()
    assert k_cache.stride()[1:] == (head_dim, 1) and block_tables.stride(1) == 1
    block_dim = max(16, next_power_of_2(head_dim))
    block_queries, block_keys, num_warps, num_stages = _tile(q.dtype, block_dim, max_queries)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _prefill_kernel[(triton.cdiv(max_queries, block_queries), num_heads, seq_lens.shape[0])](
        q,
        k_cache,
        v_cache,
        block_tables,
        starts,
        seq_lens,
        out,
        q.stride(0),
        k_cache.stride(0),
        block_tables.stride(0),
        num_heads,
        scale * LOG2_E,
        sliding_window if sliding_window is not None else 2**30,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        GROUP=num_heads // num_kv_heads,
        BLOCK_QUERIES=block_queries,
        BLOCK_KEYS=block_keys,
        PAGE_SIZE=page_size,
        HAS_WINDOW=sliding_window is not None,
        PRECISION=dot_precision(q.dtype),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


def _tile(dtype: torch.dtype, block_dim: int, max_queries: int) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of one program."""
    if is_interpreted():
        return 16, 16, 4, 1
    if dtype == torch.float32:
        return 32, 32, 4, 1
    if max_queries <= 16:
        return 16, 64, 4, 2
    if max_queries <= 64 or block_dim > 128:
        return 64, 64, 4, 2
    return 128, 64, 8, 3
