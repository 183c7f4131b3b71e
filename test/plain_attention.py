"""Owns attention as its formula has it, for stand-ins of libraries."""

import torch


def attend(q, k, v, scale, num_seen=None):
    """The last of the queries is the newest token; each sees itself and what is before it, or so many tokens in all.

    Args:
        q: [num_tokens, num_heads, head_dim].
        k, v: [num_keys, num_kv_heads, head_dim].
    """
    group = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(group, 1).float() for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    query = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
    key = torch.arange(len(k), device=q.device)
    visible = key <= query
    if num_seen is not None:
        visible &= key > query - num_seen
    probs = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probs, v).to(q.dtype)
