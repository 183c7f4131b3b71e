"""Owns latent attention in a decoder layer: its projections and norms, and how its heads are split over ranks."""

from typing import TYPE_CHECKING

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.attention.latent_attention import LatentRadixAttention
from ramet.srt.layers.latent_linear import LatentHeads
from ramet.srt.layers.layernorm import RMSNorm
from ramet.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from ramet.srt.layers.rotary_embedding import Rotation
from ramet.srt.models.attention_block import AttentionBlock
from ramet.srt.models.sparse_index import SparseIndex

if TYPE_CHECKING:
    from ramet.srt.layers.attention.expanded_chunks import ExpandedChunks

NORM_EPS = 1e-6  # of these norms in all classes, whatever a config says of the others


class LatentAttention(AttentionBlock):
    """Latent attention (DeepSeek-V2, 2024), computed on the rows that are kept; see LatentHeads.

    What gives the rows, and the first of the two matrices that give queries, are the same on every rank.

    Args:
        parallel: how attention layers are split.
        layer_id: the layer's place among those of the rank.
        owns_index: see LayerSpec.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        parallel: ParallelConfig,
        layer_id: int,
        prefix: str,
        *,
        owns_index: bool = False,
    ):
        super().__init__()
        traits, latent = config.traits, config.traits.latent
        assert latent is not None, "such layers are made where the config describes them"
        self.latent = latent

        def project(input_size: int, sizes: dict[str, int], bias: bool, split: ParallelConfig) -> torch.nn.Module:
            names = [f"{prefix}.{name}" for name in sizes]
            return MergedColumnParallelLinear(
                input_size, names, list(sizes.values()), bias=bias, dtype=dtype, parallel=split
            )

        def norm(name: str, size: int) -> RMSNorm:
            return RMSNorm(size, f"{prefix}.{name}", eps=NORM_EPS, dtype=dtype)

        num_heads, whole = config.num_attention_heads, ParallelConfig()
        rows, queries = {"kv_a_proj_with_mqa": latent.row_dim}, num_heads * latent.query_dim
        if latent.q_rank is None:
            self.kv_a_proj_with_mqa = project(config.hidden_size, rows, traits.qkv_bias, whole)
            self.q_proj = project(config.hidden_size, {"q_proj": queries}, False, parallel)
        else:
            first = {"q_a_proj": latent.q_rank, **rows}
            self.q_a_and_kv_a_proj = project(config.hidden_size, first, traits.qkv_bias, whole)
            self.q_a_layernorm = norm("q_a_layernorm", latent.q_rank)
            self.q_b_proj = project(latent.q_rank, {"q_b_proj": queries}, False, parallel)
        self.kv_a_layernorm = norm("kv_a_layernorm", latent.kv_rank)
        self.kv_b_proj = LatentHeads(latent, num_heads, f"{prefix}.kv_b_proj", dtype=dtype, parallel=parallel)
        self.o_proj = RowParallelLinear(
            num_heads * latent.value_dim,
            config.hidden_size,
            f"{prefix}.o_proj",
            bias=traits.o_bias,
            dtype=dtype,
            parallel=parallel,
        )
        self.attn = LatentRadixAttention(
            latent,
            num_heads=self.kv_b_proj.num_heads,
            scale=traits.attention_scale,
            layer_id=layer_id,
            owns_index=owns_index,
        )
        self.indexer: SparseIndex | None = None
        if owns_index:
            self.indexer = SparseIndex(config, dtype, f"{prefix}.indexer")

    def _attend(self, x: torch.Tensor, rotary: Rotation | None, forward_batch: ForwardBatch) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, columns of o_proj]."""
        assert rotary is not None, "all families with latent attention have positions"
        q, rows, low = self._project(x)
        if self.indexer is not None:
            assert low is not None
            self.indexer(x, low, rotary, self.attn, forward_batch)
        if self.attn.expanded is not None:
            self.attn.store_rows(rows, q, rotary, self.kv_a_layernorm, q, forward_batch)
            return self._attend_expanded(q, self.attn.expanded, forward_batch).flatten(1)
        queries = q.new_empty((*q.shape[:2], self.latent.row_dim))
        self.attn.store_rows(rows, q, rotary, self.kv_a_layernorm, queries, forward_batch)
        return self._attend_to_rows(q, queries, forward_batch).flatten(1)

    def _attend_to_rows(self, q: torch.Tensor, queries: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """Of q [num_tokens, num_heads, query_dim], and queries whose columns that rotate are filled.

        Returns:
            [num_tokens, num_heads, value_dim].
        """
        self.kv_b_proj.take_queries(q[..., : self.latent.nope_dim], queries[..., : self.latent.kv_rank])
        return self.kv_b_proj.take_results(self.attn(queries, forward_batch))

    def _attend_expanded(self, q: torch.Tensor, chunks: "ExpandedChunks", forward_batch: ForwardBatch) -> torch.Tensor:
        """The same of rotated q, the long chunks over expanded keys and values."""
        out = q.new_empty((*q.shape[:2], self.latent.value_dim))
        chunks.run(q, self.attn.rows, self.kv_b_proj, self.attn.scale, out)
        if chunks.others is not None:
            others = q[chunks.other_places]
            queries = others.new_empty((*others.shape[:2], self.latent.row_dim))
            queries[..., self.latent.kv_rank :] = others[..., self.latent.nope_dim :]
            out[chunks.other_places] = self._attend_to_rows(others, queries, forward_batch)
        return out

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """[num_tokens, hidden_size] -> queries [num_tokens, num_heads, query_dim] and rows [num_tokens, row_dim].

        And what the queries are made of, [num_tokens, q_rank], if they are not of one matrix.
        """
        low = None
        if self.latent.q_rank is None:
            q, rows = self.q_proj(x), self.kv_a_proj_with_mqa(x)
        else:
            low, rows = self.q_a_and_kv_a_proj(x).split([self.latent.q_rank, self.latent.row_dim], dim=-1)
            low = self.q_a_layernorm(low)
            q = self.q_b_proj(low)
        return q.unflatten(-1, (-1, self.latent.query_dim)), rows, low
