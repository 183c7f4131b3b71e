"""Stands in for torch's variable-length attention with a block table: the same arguments, computed with plain torch."""

from typing import Any

import torch

CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = []


def varlen_attn_out(
    out, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, block_table
):  # fmt: skip
    arguments = (out, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    keywords = {"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa}
    CALLS.append((arguments, keywords | {"seqused_k": seqused_k, "block_table": block_table}))
    batch_size = len(seqused_k)
    assert all(t.dtype == torch.int32 for t in (cu_seq_q, cu_seq_k, seqused_k, block_table))
    assert block_table.shape[0] == batch_size and block_table.stride(1) == 1
    assert cu_seq_k.tolist() == [0, *seqused_k.cumsum(0).tolist()]
    assert max_q >= cu_seq_q.diff().max() and max_k >= seqused_k.max() and enable_gqa
    group = query.shape[1] // key.shape[2]
    for index, length in enumerate(seqused_k.tolist()):
        pages = block_table[index].long()
        k, v = (cache[pages].flatten(0, 1)[:length].repeat_interleave(group, 1) for cache in (key, value))
        rows = slice(int(cu_seq_q[index]), int(cu_seq_q[index + 1]))
        scores = torch.einsum("qhd,khd->hqk", query[rows].float(), k.float()) * scale
        # The last query stands at the last key, and the window is counted from there.
        ahead = torch.arange(length) - torch.arange(length - (rows.stop - rows.start), length)[:, None]
        before, behind = window_size
        hidden = ahead > behind
        if before >= 0:
            hidden |= -ahead > before
        probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", probs, v.float()).to(out.dtype)
    return torch.empty(0)
