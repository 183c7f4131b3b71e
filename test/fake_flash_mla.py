"""Stands in for the part of FlashMLA that the engine calls: the same arguments, computed with plain torch."""

from typing import Any

import torch

CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []  # (function, args, kwargs)


def get_mla_metadata(*args):
    CALLS.append(("get_mla_metadata", args, {}))
    cache_seqlens, num_heads_per_head_k, num_heads_k = args
    assert cache_seqlens.dtype == torch.int32 and num_heads_k == 1
    return {"heads": num_heads_per_head_k, "lengths": cache_seqlens}, None


def flash_mla_with_kvcache(*args, **kwargs):
    CALLS.append(("flash_mla_with_kvcache", args, kwargs))
    return _attend(*args, **kwargs)


def _attend(
    q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits, *, softmax_scale
):  # fmt: skip
    """Each sequence has one query."""
    assert block_table.dtype == torch.int32 and num_splits is None and q.shape[1] == 1 == k_cache.shape[2]
    assert k_cache.shape[1] == 64 and tile_scheduler_metadata["lengths"] is cache_seqlens
    assert tile_scheduler_metadata["heads"] == q.shape[2] and q.is_contiguous()
    out = q.new_empty((*q.shape[:3], head_dim_v))
    for index, length in enumerate(cache_seqlens.tolist()):
        pages = block_table[index, : -(-length // 64)].long()
        rows = k_cache[pages].flatten(0, 1)[:length, 0].float()
        probs = (q[index, 0].float() @ rows.T * softmax_scale).softmax(-1)
        out[index, 0] = (probs @ rows[:, :head_dim_v]).to(q.dtype)
    return out, None
