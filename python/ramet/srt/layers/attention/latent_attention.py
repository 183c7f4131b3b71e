"""Owns the attention layer of latent attention: the row that is kept of each token, and the rotation of the queries."""

from typing import TYPE_CHECKING

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.configs.latent_config import LatentTraits
from ramet.srt.layers.attention.radix_attention import RadixAttention
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.layernorm import RMSNorm
from ramet.srt.layers.rotary_embedding import Rotation, apply_rotary, apply_rotary_to_neighbours
from ramet.srt.mem_cache.memory_pool import KVSpec

if TYPE_CHECKING:
    from ramet.srt.layers.attention.expanded_chunks import ExpandedChunks


class LatentRadixAttention(RadixAttention):
    """All heads have the same keys, the rows; values are the rows' first columns."""

    def __init__(self, latent: LatentTraits, *, num_heads: int, scale: float, layer_id: int, owns_index: bool = False):
        """
        Args:
            num_heads: of this rank.
            scale, layer_id: see RadixAttention.
            owns_index: see LayerSpec.
        """
        index_dim = latent.index.head_dim if latent.index is not None and owns_index else 0
        kv = KVSpec(1, latent.row_dim, latent.kv_rank, is_latent=True, index_dim=index_dim)
        super().__init__(num_heads=num_heads, kv=kv, scale=scale, layer_id=layer_id, sliding_window=None)
        self.latent: LatentTraits = latent

    def store_rows(
        self,
        rows: torch.Tensor,
        q: torch.Tensor,
        rotary: Rotation,
        norm: RMSNorm,
        queries: torch.Tensor,
        forward_batch: ForwardBatch,
    ) -> None:
        """Norm and rotate the tokens' rows and write them to the cache, and rotate the queries.

        Args:
            rows: [num_tokens, row_dim], as they are projected.
            q: [num_tokens, num_heads, query_dim].
            norm: of the columns that don't rotate.
            queries: [num_tokens, num_heads, any number]; the last columns become those of q that rotate. It may be q.
        """
        rank, rope_dim = self.latent.kv_rank, self.latent.rope_dim
        slots, is_interleaved = forward_batch.out_cache_loc, self.latent.is_interleaved
        if use_kernels(q):
            from ramet.srt.layers.kernels import latent_rows as kernel

            angles = rotary.cos, rotary.sin
            kernel.store_rows(
                rows, q, *angles, norm.weight, norm.eps, slots, self.rows, queries, is_interleaved=is_interleaved
            )
            return
        rotate = apply_rotary_to_neighbours if is_interleaved else apply_rotary
        queries[..., -rope_dim:] = rotate(q[..., -rope_dim:], rotary.cos, rotary.sin)
        kept, turning = rows.split([rank, rope_dim], dim=-1)
        turned = rotate(turning.unsqueeze(1), rotary.cos, rotary.sin)
        row = torch.cat((norm(kept).unsqueeze(1), turned), dim=-1)
        self.rows.index_copy_(0, slots, row)

    @property
    def rows(self) -> torch.Tensor:
        """[num_slots, 1, row_dim]: the cache of this layer."""
        return self.kv_pool.get_kv_buffer(self.layer.layer_id)[0]

    @property
    def expanded(self) -> "ExpandedChunks | None":
        """What of the pass under way does not attend to rows; None if all of it does."""
        return self.backend.expanded
