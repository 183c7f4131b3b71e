"""Owns the attention layer as models see it; the batch's backend does the work."""

import torch
from torch import nn

from ramet.srt.model_executor.forward_batch_info import ForwardBatch


class RadixAttention(nn.Module):
    """Attention of one layer over the paged KV cache."""

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int, layer_id: int, sliding_window: int | None):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.layer_id = layer_id
        self.sliding_window = sliding_window  # a query sees this many tokens, itself included; None: all before it

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim] -> like q.

        k and v are written to the cache first.
        """
        forward_batch.kv_pool.set_kv_buffer(self.layer_id, forward_batch.out_cache_loc, k, v)
        return forward_batch.attn_backend.forward(q, k, v, self, forward_batch)
