"""Owns decode attention over the paged KV cache: one query for each sequence, its keys split over several programs."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.paged_softmax import LOG2_E, fold_block, key_offsets
from ramet.srt.layers.kernels.runtime import (
    can_launch_early,
    dot_precision,
    is_interpreted,
    next_power_of_2,
    num_multiprocessors,
)

MAX_SPLITS = 32
PROGRAMS_PER_MULTIPROCESSOR = 3
MIN_DOT_ROWS = 16  # the least that the matrix units take


@triton.jit
def _attend_split(
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    cache_stride,
    start,
    stop,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold the keys [start, stop) of a sequence into a running softmax: (weighted sum, total, maximum)."""
    dims = tl.arange(0, BLOCK_DIM)
    dim_mask = dims < HEAD_DIM
    maximum = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
    for key in range(start, stop, BLOCK_KEYS):
        positions = key + tl.arange(0, BLOCK_KEYS)
        valid = positions < stop
        slots = key_offsets(table_ptr, positions, valid, cache_stride, PAGE_SIZE, True)
        k = tl.load(k_ptr + slots[None, :] + dims[:, None], mask=valid[None, :] & dim_mask[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        scores = tl.where(valid[None, :], scores, float("-inf"))
        v_ptrs, v_mask = v_ptr + slots[:, None] + dims[None, :], valid[:, None] & dim_mask[None, :]
        acc, total, maximum = fold_block(acc, total, maximum, scores, v_ptrs, v_mask, PRECISION, False)
    return acc, total, maximum


@triton.jit(do_not_specialize=["table_stride", "window", "num_splits"])
def _decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    seq_lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    q_stride,
    cache_stride,
    table_stride,
    num_heads,
    scale,
    window,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program attends with the query heads of one KV head to one share of a sequence's visible keys.

    With several splits, the normalised partial output and its log-sum-exp go to scratch memory for _combine_kernel.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    group = tl.arange(0, BLOCK_HEADS)
    head_mask = group < GROUP
    heads = kv_head * GROUP + group
    dims = tl.arange(0, BLOCK_DIM)
    dim_mask = dims < HEAD_DIM
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    seq_len = tl.load(seq_lens_ptr + sequence)
    first_visible = tl.maximum(0, seq_len - window)
    per_split = tl.cdiv(tl.cdiv(seq_len - first_visible, num_splits), BLOCK_KEYS) * BLOCK_KEYS
    start = first_visible + split * per_split
    stop = tl.minimum(start + per_split, seq_len)
    lse_ptrs = lse_ptr + (sequence * num_heads + heads) * num_splits + split
    if start >= stop:
        if IS_SPLIT:
            tl.store(lse_ptrs, tl.full([BLOCK_HEADS], float("-inf"), tl.float32), mask=head_mask)
        return

    q_offsets = sequence * q_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=head_mask[:, None] & dim_mask[None, :], other=0.0)
    k_ptr = k_cache_ptr + kv_head * HEAD_DIM
    v_ptr = v_cache_ptr + kv_head * HEAD_DIM
    table_ptr = block_tables_ptr + sequence * table_stride
    acc, total, maximum = _attend_split(
        q, k_ptr, v_ptr, table_ptr, cache_stride, start, stop, scale,
        HEAD_DIM, BLOCK_DIM, BLOCK_HEADS, BLOCK_KEYS, PAGE_SIZE, PRECISION,
    )  # fmt: skip
    out = acc / total[:, None]
    out_mask = head_mask[:, None] & dim_mask[None, :]
    rows = sequence * num_heads + heads
    if not IS_SPLIT:
        tl.store(out_ptr + rows[:, None] * HEAD_DIM + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)
    else:
        partial_rows = rows * num_splits + split
        tl.store(partial_ptr + partial_rows[:, None] * HEAD_DIM + dims[None, :], out, mask=out_mask)
        tl.store(lse_ptrs, maximum + tl.log2(total), mask=head_mask)


@triton.jit(do_not_specialize=["num_splits"])
def _combine_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program sums the splits of one head of one sequence, weighted by their softmax totals."""
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, BLOCK_SPLITS)
    dims = tl.arange(0, BLOCK_DIM)
    dim_mask = dims < HEAD_DIM
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    lse = tl.load(lse_ptr + row * num_splits + splits, mask=splits < num_splits, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    offsets = (row * num_splits + splits)[:, None] * HEAD_DIM + dims[None, :]
    mask = (lse > float("-inf"))[:, None] & dim_mask[None, :]  # an empty split wrote nothing
    partial = tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    out = tl.sum(partial * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out_ptr + row * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dim_mask)


def num_kv_splits(batch_size: int, num_kv_heads: int, device: torch.device) -> int:
    """Programs that share a sequence's keys: a power of two that keeps the GPU busy at this batch size."""
    wanted = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(device) // (batch_size * num_kv_heads)
    return min(MAX_SPLITS, next_power_of_2(wanted + 1) // 2) if wanted > 1 else 1


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attention of each sequence's newest token, whose key and value are in the cache, to all visible ones.

    Args:
        q: [batch_size, num_heads, head_dim], each row contiguous.
        k_cache, v_cache: [num_slots, num_kv_heads, head_dim], each slot contiguous.
        block_tables: integer [batch_size, max_pages].
        seq_lens: int32 [batch_size]; the output of a sequence of length 0 is undefined.

    Returns:
        Contiguous [batch_size, num_heads, head_dim].
    """
    batch_size, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    assert q.stride()[1:] == (head_dim, 1) and k_cache.stride() == v_cache.stride()
    assert k_cache.stride()[1:] == (head_dim, 1) and block_tables.stride(1) == 1
    group = num_heads // num_kv_heads
    num_splits = num_kv_splits(batch_size, num_kv_heads, q.device)
    block_dim = max(16, next_power_of_2(head_dim))
    early = can_launch_early(q.device)
    out = torch.empty((batch_size, num_heads, head_dim), dtype=q.dtype, device=q.device)
    scratch = out
    lse = out
    if num_splits > 1:
        scratch = torch.empty((batch_size, num_heads, num_splits, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((batch_size, num_heads, num_splits), dtype=torch.float32, device=q.device)
    _decode_kernel[(batch_size, num_kv_heads, num_splits)](
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        out,
        scratch,
        lse,
        q.stride(0),
        k_cache.stride(0),
        block_tables.stride(0),
        num_heads,
        scale * LOG2_E,
        sliding_window if sliding_window is not None else 2**30,
        num_splits,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        GROUP=group,
        BLOCK_HEADS=max(MIN_DOT_ROWS, next_power_of_2(group)),
        BLOCK_KEYS=_block_keys(q.dtype, block_dim),
        PAGE_SIZE=page_size,
        IS_SPLIT=num_splits > 1,
        PRECISION=dot_precision(q.dtype),
        EARLY=early,
        num_warps=4,
        num_stages=1 if q.dtype == torch.float32 else 3,
        **({"launch_pdl": True} if early else {}),
    )
    if num_splits > 1:
        _combine(scratch, lse, out)
    return out


def _combine(scratch: torch.Tensor, lse: torch.Tensor, out: torch.Tensor) -> None:
    """Sum the splits in `scratch` [batch_size, num_heads, num_splits, head_dim] into `out`, weighted by `lse`."""
    batch_size, num_heads, num_splits, head_dim = scratch.shape
    early = can_launch_early(out.device)
    _combine_kernel[(batch_size * num_heads,)](
        scratch,
        lse,
        out,
        num_splits,
        HEAD_DIM=head_dim,
        BLOCK_DIM=max(16, next_power_of_2(head_dim)),
        BLOCK_SPLITS=MAX_SPLITS,
        EARLY=early,
        num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )


def _block_keys(dtype: torch.dtype, block_dim: int) -> int:
    """Keys in one step of a program: tiles of both caches must fit into shared memory, a few stages deep."""
    if is_interpreted():
        return 16
    return 32 if dtype == torch.float32 or block_dim > 128 else 64
