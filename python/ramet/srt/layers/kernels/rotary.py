"""Owns the kernel between the qkv projection and attention: head norms, rotation, and the write to the KV cache."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early, next_power_of_2

HEADS_PER_PROGRAM = 4
MAX_FP8 = tl.constexpr(448.0)


@triton.jit
def _weight_of(q_weight_ptr, k_weight_ptr, heads, columns, is_q, is_k, in_part, OFFSET: tl.constexpr):
    """float32 [heads, columns]: the norm's weight for each head, zeros for heads of v."""
    q_mask = is_q[:, None] & in_part
    k_mask = is_k[:, None] & in_part
    columns = heads[:, None] * 0 + columns[None, :]
    weight = tl.load(q_weight_ptr + columns, mask=q_mask, other=0.0).to(tl.float32)
    return weight + tl.load(k_weight_ptr + columns, mask=k_mask, other=0.0).to(tl.float32) + OFFSET


@triton.jit
def _store_head(k_ptrs, v_ptrs, values, k_mask, v_mask, scales):
    """Write heads of k and v to the cache: as they are, or divided by their scales where it is fp8."""
    if k_ptrs.dtype.element_ty == tl.float8e4nv:
        values = tl.clamp(values.to(tl.float32) / scales, -MAX_FP8, MAX_FP8).to(tl.float8e4nv)
    tl.store(k_ptrs, values, mask=k_mask)
    tl.store(v_ptrs, values, mask=v_mask)


@triton.jit
def _load_sum(ptrs, mask, part_stride, PARTS: tl.constexpr):
    """float32: what is there, in PARTS parts."""
    values = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        values += tl.load(ptrs + part * part_stride, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def _rotate_and_store_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    slots_ptr,
    scales_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    qkv_stride,
    out_stride,
    cache_stride,
    num_q_heads,
    num_kv_heads,
    eps,
    HEAD_DIM: tl.constexpr,
    HALF_DIM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ROTATION: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_GATES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program takes a few heads of one token. Heads count through q, k and v; v is only copied to the cache.

    Of each head, 2 * HALF_DIM columns rotate; behind them are REST (a power of two, or 0) and fewer that do not. With
    more than one of PARTS there is one token, whose row is their sum: a part is a row of qkv.
    """
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_q = heads < num_q_heads
    is_k = (heads >= num_q_heads) & (heads < num_q_heads + num_kv_heads)
    is_v = (heads >= num_q_heads + num_kv_heads) & (heads < num_q_heads + 2 * num_kv_heads)
    is_any = (is_q | is_k | is_v)[:, None]
    rotated = (is_q | is_k)[:, None]
    columns = tl.arange(0, HALF)
    in_half = (columns < HALF_DIM)[None, :]
    mask = is_any & in_half
    places = heads  # in the row; elsewhere they are counted without gates
    if HAS_GATES:  # behind each query
        places = heads + tl.minimum(heads, num_q_heads)
    offsets = places[:, None] * HEAD_DIM + columns[None, :]
    kept = heads[:, None] * HEAD_DIM + columns[None, :]
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row_ptr = qkv_ptr + token * qkv_stride
    out_row_ptr = out_ptr + token * out_stride
    slot = tl.load(slots_ptr + token).to(tl.int64)
    k_cache_ptr += slot * cache_stride - num_q_heads * HEAD_DIM
    v_cache_ptr += slot * cache_stride - (num_q_heads + num_kv_heads) * HEAD_DIM
    first = _load_sum(row_ptr + offsets, mask, qkv_stride, PARTS)
    second = _load_sum(row_ptr + offsets + HALF_DIM, mask, qkv_stride, PARTS)
    square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    if REST > 0:
        rest_columns = 2 * HALF_DIM + tl.arange(0, REST)
        in_rest = (rest_columns < HEAD_DIM)[None, :]
        rest_offsets = places[:, None] * HEAD_DIM + rest_columns[None, :]
        rest_kept = heads[:, None] * HEAD_DIM + rest_columns[None, :]
        rest = _load_sum(row_ptr + rest_offsets, is_any & in_rest, qkv_stride, PARTS)
        square += tl.sum(rest * rest, axis=1)
    if HAS_NORM:
        scale = tl.rsqrt(square / HEAD_DIM + eps)[:, None]
        weight = _weight_of(q_weight_ptr, k_weight_ptr, heads, columns, is_q, is_k, in_half, OFFSET)
        first = tl.where(rotated, first * scale * weight, first)
        weight = _weight_of(q_weight_ptr, k_weight_ptr, heads, columns + HALF_DIM, is_q, is_k, in_half, OFFSET)
        second = tl.where(rotated, second * scale * weight, second)
        if REST > 0:
            weight = _weight_of(q_weight_ptr, k_weight_ptr, heads, rest_columns, is_q, is_k, in_rest, OFFSET)
            rest = tl.where(rotated, rest * scale * weight, rest)
    if HAS_ROTATION:
        angle = token * HALF_DIM + columns
        cos = tl.load(cos_ptr + angle, mask=columns < HALF_DIM, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + angle, mask=columns < HALF_DIM, other=0.0).to(tl.float32)[None, :]
        turned = tl.where(rotated, first * cos - second * sin, first)
        second = tl.where(rotated, second * cos + first * sin, second)
        first = turned
    first = first.to(out_ptr.dtype.element_ty)
    second = second.to(out_ptr.dtype.element_ty)
    tl.store(out_row_ptr + kept, first, mask=rotated & in_half)
    tl.store(out_row_ptr + kept + HALF_DIM, second, mask=rotated & in_half)
    scales = tl.full([BLOCK_HEADS, 1], 1.0, tl.float32)
    if HAS_SCALES:
        scales = tl.load(scales_ptr + is_v.to(tl.int32))[:, None]
    k_mask, v_mask = is_k[:, None] & in_half, is_v[:, None] & in_half
    _store_head(k_cache_ptr + kept, v_cache_ptr + kept, first, k_mask, v_mask, scales)
    _store_head(k_cache_ptr + kept + HALF_DIM, v_cache_ptr + kept + HALF_DIM, second, k_mask, v_mask, scales)
    if REST > 0:
        rest = rest.to(out_ptr.dtype.element_ty)
        tl.store(out_row_ptr + rest_kept, rest, mask=rotated & in_rest)
        k_mask, v_mask = is_k[:, None] & in_rest, is_v[:, None] & in_rest
        _store_head(k_cache_ptr + rest_kept, v_cache_ptr + rest_kept, rest, k_mask, v_mask, scales)


def rotate_and_store(
    qkv: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_q_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    norm_offset: float = 0.0,
    kv_scales: torch.Tensor | None = None,
    has_gates: bool = False,
    sum_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Norm the heads of q and k (with norms given), rotate them in place, and write k and v to their cache slots.

    Args:
        qkv: [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]; rows may be apart.
        has_gates: behind each head of q stands another one in the row. Nothing is overwritten then.
        sum_dtype: qkv is float32, parts of one token's row, which is their sum in this type; they are kept.
        rotary: cosines and sines, contiguous [num_tokens, 1, columns of a head that rotate / 2]; None rotates nothing.
        slots: int64 [num_tokens].
        k_cache, v_cache: [num_slots, num_kv_heads, head_dim], each slot contiguous, like qkv or float8_e4m3fn.
        kv_scales: float32 [2], what k and v are divided by in a cache of fp8; None for 1.
        q_norm, k_norm: [head_dim], both or none; `norm_offset` is added to them, in float32.

    Returns:
        q: the first columns of rows as wide as those of qkv, without gates.
    """
    num_kv_heads, head_dim = k_cache.shape[1:]
    cos, sin = (qkv, qkv) if rotary is None else rotary
    half_dim = head_dim // 2 if rotary is None else cos.shape[-1]
    assert qkv.stride(1) == 1 and (rotary is None or (cos.is_contiguous() and sin.is_contiguous()))
    assert k_cache.stride() == v_cache.stride() and k_cache.stride()[1:] == (head_dim, 1)
    out, num_tokens, num_parts, heads_each = qkv, len(qkv), 1, HEADS_PER_PROGRAM
    if sum_dtype is not None:
        num_tokens, num_parts, heads_each = 1, len(qkv), 1
    if has_gates or sum_dtype is not None:
        width = (num_q_heads + 2 * num_kv_heads) * head_dim
        out = torch.empty((num_tokens, width), dtype=sum_dtype or qkv.dtype, device=qkv.device)
    q = out[:, : num_q_heads * head_dim].unflatten(-1, (num_q_heads, head_dim))
    if qkv.shape[0] == 0:
        return q
    early = can_launch_early(qkv.device)
    half, num_rest = next_power_of_2(half_dim), head_dim - 2 * half_dim
    _rotate_and_store_kernel[(num_tokens, triton.cdiv(num_q_heads + 2 * num_kv_heads, heads_each))](
        qkv,
        cos,
        sin,
        q_norm if q_norm is not None else qkv,
        k_norm if k_norm is not None else qkv,
        slots,
        slots if kv_scales is None else kv_scales,
        k_cache,
        v_cache,
        out,
        qkv.stride(0),
        out.stride(0),
        k_cache.stride(0),
        num_q_heads,
        num_kv_heads,
        eps,
        HEAD_DIM=head_dim,
        HALF_DIM=half_dim,
        HALF=half,
        REST=next_power_of_2(num_rest) if num_rest else 0,
        OFFSET=norm_offset,
        HAS_NORM=q_norm is not None,
        HAS_ROTATION=rotary is not None,
        HAS_SCALES=kv_scales is not None,
        HAS_GATES=has_gates,
        PARTS=num_parts,
        BLOCK_HEADS=heads_each,
        EARLY=early,
        num_warps=min(4, max(1, heads_each * half // 64)),
        **({"launch_pdl": True} if early else {}),
    )
    return q
