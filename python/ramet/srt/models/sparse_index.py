"""Owns the sparse index of a decoder layer: its projections, the key that is kept of each token, and what it asks."""

import torch
import torch.nn.functional as F
from torch import nn

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.attention.radix_attention import RadixAttention
from ramet.srt.layers.attention.sparse_backend import SparseBackend
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.layernorm import LayerNorm
from ramet.srt.layers.linear import MergedColumnParallelLinear
from ramet.srt.layers.matmul import project
from ramet.srt.layers.parameter import declare_weight, shard_box
from ramet.srt.layers.rotary_embedding import Rotation, apply_rotary, apply_rotary_to_neighbours

NORM_EPS = 1e-6  # in all classes, whatever a config says of other norms


class SparseIndex(nn.Module):
    """The index of DeepSeek-V3.2 (2025) in the model's own type. The same on every rank.

    The published kernels turn queries and keys by a Hadamard matrix, which changes no product, and round them to fp8;
    as in transformers, neither is done.

    Args:
        prefix: of the index in the checkpoint.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, prefix: str):
        super().__init__()
        latent = config.traits.latent
        assert latent is not None and latent.index is not None and latent.q_rank is not None
        self.index = latent.index
        num_heads, head_dim = self.index.num_heads, self.index.head_dim

        def project_whole(name: str, input_size: int, output_size: int) -> MergedColumnParallelLinear:
            names, whole = [f"{prefix}.{name}"], ParallelConfig()
            return MergedColumnParallelLinear(input_size, names, [output_size], bias=False, dtype=dtype, parallel=whole)

        self.wq_b = project_whole("wq_b", latent.q_rank, num_heads * head_dim)
        self.wk = project_whole("wk", config.hidden_size, head_dim)
        self.k_norm = LayerNorm(head_dim, f"{prefix}.k_norm", eps=NORM_EPS, dtype=dtype)
        self.weights_proj = HeadWeights(config.hidden_size, num_heads, f"{prefix}.weights_proj")

    def forward(
        self, x: torch.Tensor, low: torch.Tensor, rotary: Rotation, attn: RadixAttention, forward_batch: ForwardBatch
    ) -> None:
        """Keep the tokens' keys, and have the backend choose what their queries attend to, where they see more.

        Args:
            x: [num_tokens, hidden_size].
            low: [num_tokens, q_rank], what the queries of attention are made of, too.
            attn: the layer's, whose backend chooses.
        """
        backend, layer_id = attn.backend, attn.layer.layer_id
        assert isinstance(backend, SparseBackend), "the registry gives no other to a model with an index"
        keys, cache = self.wk(x), backend.kv_pool.get_index_keys(layer_id)
        q = None
        if backend.is_sparse:
            q = self.wq_b(low).unflatten(-1, (self.index.num_heads, self.index.head_dim))
        q = self._rotate_and_store(keys, q, rotary, forward_batch.out_cache_loc, cache)
        if q is not None:
            backend.choose(q, self.weights_proj(x), layer_id, forward_batch)

    def _rotate_and_store(
        self, keys: torch.Tensor, q: torch.Tensor | None, rotary: Rotation, slots: torch.Tensor, cache: torch.Tensor
    ) -> torch.Tensor | None:
        """Norm and rotate the keys, [num_tokens, head_dim], write them to `slots` of the cache, and rotate q."""
        if use_kernels(keys):
            from ramet.srt.layers.kernels.index_rows import store_index_keys

            store_index_keys(
                keys,
                q,
                rotary.cos,
                rotary.sin,
                self.k_norm.weight,
                self.k_norm.bias,
                self.k_norm.eps,
                slots,
                cache,
                is_interleaved=self.index.is_interleaved,
            )
            return q
        cache.index_copy_(0, slots, self._rotate(self.k_norm(keys).unsqueeze(1), rotary).squeeze(1))
        return None if q is None else self._rotate(q, rotary)

    def _rotate(self, x: torch.Tensor, rotary: Rotation) -> torch.Tensor:
        """[num_tokens, num_heads, head_dim], of which the first columns rotate."""
        if not self.index.is_interleaved:
            return apply_rotary(x, rotary.cos, rotary.sin)
        turning = 2 * rotary.cos.shape[-1]
        return torch.cat((apply_rotary_to_neighbours(x[..., :turning], rotary.cos, rotary.sin), x[..., turning:]), -1)


class HeadWeights(nn.Module):
    """How much each head of an index counts, in float32 whatever the model's type, and never quantised."""

    def __init__(self, hidden_size: int, num_heads: int, name: str):
        super().__init__()
        shape = (num_heads, hidden_size)
        self.weight = declare_weight(shape, torch.float32, [shard_box(f"{name}.weight", shape, 0, 0, num_heads)])
        self.scale = num_heads**-0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> float32 [num_tokens, num_heads]."""
        weights = project(x.float(), self.weight) if use_kernels(x) else F.linear(x.float(), self.weight)
        return weights * self.scale
