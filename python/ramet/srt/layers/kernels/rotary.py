"""Owns the kernel between the qkv projection and attention: head norms, rotation, and the write to the KV cache."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early, next_power_of_2

HEADS_PER_PROGRAM = 4


@triton.jit
def _rotate_and_store_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    qkv_stride,
    cache_stride,
    num_q_heads,
    num_kv_heads,
    eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes a few heads of one token. Heads count through q, k and v; v is only copied to the cache."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_q = heads < num_q_heads
    is_k = (heads >= num_q_heads) & (heads < num_q_heads + num_kv_heads)
    is_v = (heads >= num_q_heads + num_kv_heads) & (heads < num_q_heads + 2 * num_kv_heads)
    columns = tl.arange(0, HALF)
    in_half = (columns < HEAD_DIM // 2)[None, :]
    mask = (is_q | is_k | is_v)[:, None] & in_half
    offsets = heads[:, None] * HEAD_DIM + columns[None, :]
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row_ptr = qkv_ptr + token * qkv_stride
    first = tl.load(row_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(row_ptr + offsets + HEAD_DIM // 2, mask=mask, other=0.0).to(tl.float32)
    rotated = (is_q | is_k)[:, None]
    if HAS_NORM:
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(square / HEAD_DIM + eps)[:, None]
        columns_row = columns[None, :] + tl.zeros([BLOCK_HEADS, HALF], dtype=tl.int32)
        q_mask = is_q[:, None] & in_half
        k_mask = is_k[:, None] & in_half
        weight = tl.load(q_weight_ptr + columns_row, mask=q_mask, other=0.0).to(tl.float32)
        weight += tl.load(k_weight_ptr + columns_row, mask=k_mask, other=0.0).to(tl.float32)
        first = tl.where(rotated, first * scale * weight, first)
        weight = tl.load(q_weight_ptr + columns_row + HEAD_DIM // 2, mask=q_mask, other=0.0).to(tl.float32)
        weight += tl.load(k_weight_ptr + columns_row + HEAD_DIM // 2, mask=k_mask, other=0.0).to(tl.float32)
        second = tl.where(rotated, second * scale * weight, second)
    angle = token * (HEAD_DIM // 2) + columns
    cos = tl.load(cos_ptr + angle, mask=columns < HEAD_DIM // 2, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle, mask=columns < HEAD_DIM // 2, other=0.0).to(tl.float32)[None, :]
    out_first = tl.where(rotated, first * cos - second * sin, first).to(qkv_ptr.dtype.element_ty)
    out_second = tl.where(rotated, second * cos + first * sin, second).to(qkv_ptr.dtype.element_ty)
    in_place = rotated & in_half
    tl.store(row_ptr + offsets, out_first, mask=in_place)
    tl.store(row_ptr + offsets + HEAD_DIM // 2, out_second, mask=in_place)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    k_offsets = slot * cache_stride + offsets - num_q_heads * HEAD_DIM
    v_offsets = k_offsets - num_kv_heads * HEAD_DIM
    k_mask = is_k[:, None] & in_half
    v_mask = is_v[:, None] & in_half
    tl.store(k_cache_ptr + k_offsets, out_first, mask=k_mask)
    tl.store(k_cache_ptr + k_offsets + HEAD_DIM // 2, out_second, mask=k_mask)
    tl.store(v_cache_ptr + v_offsets, out_first, mask=v_mask)
    tl.store(v_cache_ptr + v_offsets + HEAD_DIM // 2, out_second, mask=v_mask)


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_q_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> None:
    """Norm the heads of q and k (with norms given), rotate them in place, and write k and v to their cache slots.

    Args:
        qkv: [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]; rows may be apart.
        cos, sin: contiguous [num_tokens, 1, head_dim / 2].
        slots: int64 [num_tokens].
        k_cache, v_cache: [num_slots, num_kv_heads, head_dim], each slot contiguous.
        q_norm, k_norm: [head_dim], both or none.
    """
    num_kv_heads, head_dim = k_cache.shape[1:]
    assert qkv.stride(1) == 1 and cos.is_contiguous() and sin.is_contiguous()
    assert k_cache.stride() == v_cache.stride() and k_cache.stride()[1:] == (head_dim, 1)
    if qkv.shape[0] == 0:
        return
    early = can_launch_early(qkv.device)
    half = next_power_of_2(head_dim // 2)
    _rotate_and_store_kernel[(qkv.shape[0], triton.cdiv(num_q_heads + 2 * num_kv_heads, HEADS_PER_PROGRAM))](
        qkv,
        cos,
        sin,
        q_norm if q_norm is not None else qkv,
        k_norm if k_norm is not None else qkv,
        slots,
        k_cache,
        v_cache,
        qkv.stride(0),
        k_cache.stride(0),
        num_q_heads,
        num_kv_heads,
        eps,
        HEAD_DIM=head_dim,
        HALF=half,
        HAS_NORM=q_norm is not None,
        BLOCK_HEADS=HEADS_PER_PROGRAM,
        EARLY=early,
        num_warps=min(4, max(1, HEADS_PER_PROGRAM * half // 64)),
        **({"launch_pdl": True} if early else {}),
    )
