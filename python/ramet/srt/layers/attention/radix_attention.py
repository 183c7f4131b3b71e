"""Owns the attention layer as models see it: rotation, cache write, attention. Its backend does the last."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.configs.latent_config import LatentTraits
from ramet.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer
from ramet.srt.layers.cpu_kernels import ops as cpu_ops
from ramet.srt.layers.cpu_kernels.ops import use_cpu_kernels
from ramet.srt.layers.kernels.runtime import has_fp8_units, use_kernels
from ramet.srt.layers.layernorm import RMSNorm
from ramet.srt.layers.parameter import declare_weight
from ramet.srt.layers.rotary_embedding import Rotation, apply_rotary
from ramet.srt.layers.row_sums import RowSums
from ramet.srt.mem_cache.memory_pool import KVSpec, TokenToKVPool
from ramet.srt.weights.manifest import WeightBox


class HeadNorms(NamedTuple):
    """Norms of each head of the queries and of the keys, before the rotation."""

    q: RMSNorm
    k: RMSNorm


class RadixAttention(nn.Module):
    """Attention of one layer over the paged KV cache. It can run once it is bound."""

    backend: AttentionBackend
    kv_pool: TokenToKVPool
    latent: LatentTraits | None = None

    def __init__(
        self,
        *,
        num_heads: int,
        kv: KVSpec,
        scale: float,
        layer_id: int,
        sliding_window: int | None,
        soft_cap: float | None = None,
        scales_prefix: str | None = None,
        sinks: nn.Parameter | None = None,
        has_gate: bool = False,
    ):
        """
        Args:
            kv: what the cache keeps.
            scale: of the products of queries and keys.
            soft_cap: see AttentionSpec.
            layer_id, sliding_window, sinks: see AttentionLayer.
            has_gate: each head of the queries has a second one behind it, whose sigmoid scales its output.
            scales_prefix: of the checkpoint's scales of keys and values in an fp8 cache; None if it has none.
        """
        super().__init__()
        self.num_heads = num_heads
        self.kv = kv
        self.scale = scale
        self.soft_cap = soft_cap
        # float32 [2], of keys and values. A weight whatever the cache's type is: others may take it from here.
        self.kv_scales = None
        if scales_prefix is not None:
            boxes = [WeightBox(f"{scales_prefix}.{part}_scale", ((0, 1),), ((place, place + 1),))
                     for place, part in enumerate("kv")]  # fmt: skip
            self.kv_scales = declare_weight((2,), torch.float32, boxes)
        self.sinks = sinks
        self.has_gate = has_gate
        self.layer = AttentionLayer(layer_id, sliding_window)

    def bind(self, backend: AttentionBackend) -> None:
        """Compute with `backend`, over its KV pool, from now on. The weights have their places already."""
        self.backend = backend
        self.kv_pool = backend.kv_pool
        kv_scales = self.kv_scales if self.kv_pool.is_fp8 else None
        self.layer = dataclasses.replace(self.layer, kv_scales=kv_scales, sinks=self.sinks)

    def forward(self, q: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """q [num_tokens, num_heads, key_dim] -> [num_tokens, num_heads, value_dim]. `rotate_and_store` comes before."""
        scales = self.layer.kv_scales
        if scales is None or self.backend.applies_kv_scales:
            return self.backend.forward(q, self.layer, forward_batch)
        return self.backend.forward(q * scales[0], self.layer, forward_batch) * scales[1]

    def rotate_and_store(
        self, qkv: torch.Tensor | RowSums, rotary: Rotation | None, norms: HeadNorms | None, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """Norm and rotate q and k, and write k and v to the cache.

        Args:
            qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], with gates num_heads more; but for them it
                may be overwritten. Of one token on a GPU, also the sums of it, without gates.
            rotary: None for a layer without positions.
            norms: of each head; None for none.

        Returns:
            q for `forward`: [num_tokens, num_heads, head_dim].
        """
        slots, layer_id = forward_batch.out_cache_loc, self.layer.layer_id
        if self.layer.sliding_window is not None and forward_batch.window_cache_loc is not None:
            slots = forward_batch.window_cache_loc
        rows, sum_dtype = qkv if isinstance(qkv, RowSums) else (qkv, None)
        q_norm, k_norm = (norms.q.weight, norms.k.weight) if norms is not None else (None, None)
        cos_sin = rotary[:2] if rotary is not None else None
        has_kernels, has_cpu_kernels = self.has_kernels(rows), use_cpu_kernels(rows, q_norm, k_norm, *(cos_sin or ()))
        if has_kernels or has_cpu_kernels:
            arguments: dict[str, Any] = {
                "num_q_heads": self.num_heads,
                "q_norm": q_norm,
                "k_norm": k_norm,
                "eps": norms.q.eps if norms is not None else 0.0,
                "norm_offset": norms.q.offset if norms is not None else 0.0,
                "has_gates": self.has_gate,
                "kv_scales": self.layer.kv_scales,
            }
            places = (cos_sin, slots, *self.kv_pool.get_kv_buffer(layer_id))
            if has_kernels:
                from ramet.srt.layers.kernels import rotary as kernel

                q = kernel.rotate_and_store(rows, *places, **arguments, sum_dtype=sum_dtype)
            else:
                q = cpu_ops.rotate_and_store(rows, *places, **arguments)
            return q if rotary is None or rotary.query_scale is None else q * rotary.query_scale
        heads = rows.unflatten(-1, (-1, self.kv.key_dim))
        num_query_heads = (1 + self.has_gate) * self.num_heads
        q = heads[:, : num_query_heads : 1 + self.has_gate]
        k, v = heads[:, num_query_heads:].split(self.kv.num_kv_heads, dim=1)
        if norms is not None:
            q, k = norms.q(q), norms.k(k)
        if rotary is not None:
            q, k = apply_rotary(q, rotary.cos, rotary.sin), apply_rotary(k, rotary.cos, rotary.sin)
            q = q if rotary.query_scale is None else q * rotary.query_scale
        self.kv_pool.set_kv_buffer(layer_id, slots, k, v, self.layer.kv_scales)
        return q

    def has_kernels(self, x: torch.Tensor) -> bool:
        """Whether a kernel does what is done where `x` is."""
        return use_kernels(x) and (not self.kv_pool.is_fp8 or has_fp8_units(x.device))

    def gated(self, out: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        """The output [num_tokens, num_heads, columns], scaled by the gates that stand among the queries of `qkv`."""
        if use_kernels(out):
            from ramet.srt.layers.kernels.output_gate import gate_output

            return gate_output(out, qkv)
        gates = qkv.unflatten(-1, (-1, self.kv.key_dim))[:, 1 : 2 * self.num_heads : 2]
        return out * gates.sigmoid()
