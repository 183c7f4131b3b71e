"""Owns the attention layer of latent attention: the row that is kept of each token, and the rotation of the queries."""

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.configs.latent_config import LatentTraits
from ramet.srt.layers.attention.radix_attention import RadixAttention
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.layernorm import RMSNorm
from ramet.srt.layers.rotary_embedding import Rotation, apply_rotary, apply_rotary_to_neighbours
from ramet.srt.mem_cache.memory_pool import KVSpec


class LatentRadixAttention(RadixAttention):
    """All heads have the same keys, the rows; values are the rows' first columns."""

    def __init__(self, latent: LatentTraits, *, num_heads: int, scale: float, layer_id: int):
        """
        Args:
            num_heads: of this rank.
            scale, layer_id: see RadixAttention.
        """
        kv = KVSpec(1, latent.row_dim, latent.kv_rank, is_latent=True)
        super().__init__(num_heads=num_heads, kv=kv, scale=scale, layer_id=layer_id, sliding_window=None)
        self.latent = latent

    def store_rows(
        self, rows: torch.Tensor, q: torch.Tensor, rotary: Rotation, norm: RMSNorm, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """Norm and rotate the tokens' rows and write them to the cache, and rotate the queries.

        Args:
            rows: [num_tokens, row_dim], as they are projected.
            q: [num_tokens, num_heads, query_dim].
            norm: of the columns that don't rotate.

        Returns:
            [num_tokens, num_heads, row_dim] for `forward`: the columns that rotate are in place, behind those that
            come from the others of q and are not filled.
        """
        rank, rope_dim = self.latent.kv_rank, self.latent.rope_dim
        queries = q.new_empty((*q.shape[:2], self.latent.row_dim))
        keys, _ = self.kv_pool.get_kv_buffer(self.layer.layer_id)
        slots, is_interleaved = forward_batch.out_cache_loc, self.latent.is_interleaved
        if use_kernels(q):
            from ramet.srt.layers.kernels import latent_rows as kernel

            angles = rotary.cos, rotary.sin
            kernel.store_rows(
                rows, q, *angles, norm.weight, norm.eps, slots, keys, queries, is_interleaved=is_interleaved
            )
            return queries
        rotate = apply_rotary_to_neighbours if is_interleaved else apply_rotary
        queries[..., rank:] = rotate(q[..., -rope_dim:], rotary.cos, rotary.sin)
        kept, turning = rows.split([rank, rope_dim], dim=-1)
        turned = rotate(turning.unsqueeze(1), rotary.cos, rotary.sin)
        row = torch.cat((norm(kept).unsqueeze(1), turned), dim=-1)
        keys.index_copy_(0, slots, row)
        return queries
