"""Owns the attention layer as models see it: rotation, cache write, attention. The batch's backend does the last."""

import torch
from torch import nn

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.layernorm import RMSNorm
from ramet.srt.layers.rotary_embedding import apply_rotary


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

        The cache holds k and v already: `norm_and_rotate` writes them.
        """
        return forward_batch.attn_backend.forward(q, k, v, self, forward_batch)

    def norm_and_rotate(
        self,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        forward_batch: ForwardBatch,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The output of the qkv projection as q, k and v for `forward`, with k and v written to the cache.

        Args:
            qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; may be overwritten.
            rotary: cosines and sines [num_tokens, 1, head_dim / 2].
            q_norm, k_norm: norms of the heads of q and k before the rotation, or none.
        """
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if use_kernels(qkv):
            from ramet.srt.layers.kernels.rotary import rotate_and_store

            rotate_and_store(
                qkv,
                *rotary,
                forward_batch.out_cache_loc,
                *forward_batch.kv_pool.get_kv_buffer(self.layer_id),
                num_q_heads=self.num_heads,
                q_norm=q_norm.weight if q_norm is not None else None,
                k_norm=k_norm.weight if k_norm is not None else None,
                eps=q_norm.eps if q_norm is not None else 0.0,
            )
            return q, k, v
        if q_norm is not None and k_norm is not None:
            q, k = q_norm(q), k_norm(k)
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        forward_batch.kv_pool.set_kv_buffer(self.layer_id, forward_batch.out_cache_loc, k, v)
        return q, k, v
