"""Stands in for FlashAttention 3's module flash_attn_interface: the same arguments, computed with plain torch."""

from typing import Any

import torch
from plain_attention import attend

CALLS: list[dict[str, Any]] = []


def flash_attn_with_kvcache(q, k_cache, v_cache, **options):
    CALLS.append(options)
    return _attend(q, k_cache, v_cache, **options)


def _attend(
    q, k_cache, v_cache, *, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size
):  # fmt: skip
    """A window is of so many keys before the query and behind it, -1 for all."""
    assert all(t.dtype == torch.int32 for t in (cache_seqlens, page_table, cu_seqlens_q)) and causal
    assert q.stride(-1) == 1 and page_table.is_contiguous()
    left, right = window_size
    assert right == 0 and (cu_seqlens_q.diff() <= max_seqlen_q).all() and cu_seqlens_q[-1] == len(q)
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
    starts = cu_seqlens_q.tolist()
    for pages, length, start, stop in zip(page_table, cache_seqlens.tolist(), starts[:-1], starts[1:], strict=True):
        assert length <= len(pages) * k_cache.shape[1]
        k, v = (cache[pages.long()].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        out[start:stop] = attend(q[start:stop], k, v, softmax_scale, None if left < 0 else left + 1)
    return out
