"""Owns attention with Ramet's Triton kernels: which kernel runs, and what the layers of a pass share."""

from itertools import accumulate

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer, AttentionSpec
from ramet.srt.layers.kernels.decode_attention import decode_attention
from ramet.srt.layers.kernels.prefill_attention import prefill_attention
from ramet.srt.layers.kernels.runtime import can_run_kernels
from ramet.srt.mem_cache.memory_pool import MHATokenToKVPool
from ramet.srt.utils.device import to_device


class TritonAttnBackend(AttentionBackend):
    """Reads keys and values where they lie; nothing is gathered. Decoding can be captured in a CUDA graph."""

    can_be_captured = True

    def __init__(self, spec: AttentionSpec, kv_pool: MHATokenToKVPool):
        super().__init__(spec, kv_pool)
        self._starts: torch.Tensor  # int32 [batch_size + 1]: where the new tokens of each prompt start
        self._max_queries = 0

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        return None if can_run_kernels(spec.device) else "a GPU"

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if forward_batch.forward_mode is ForwardMode.DECODE:
            return
        starts = list(accumulate(forward_batch.extend_lens_cpu, initial=0))
        self._starts = to_device(starts, torch.int32, forward_batch.seq_lens.device)
        self._max_queries = max(forward_batch.extend_lens_cpu, default=0)

    def forward(self, q: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch) -> torch.Tensor:
        k_cache, v_cache = self.kv_pool.get_kv_buffer(layer.layer_id)
        if forward_batch.forward_mode is ForwardMode.DECODE:
            return decode_attention(
                q,
                k_cache,
                v_cache,
                forward_batch.block_tables,
                forward_batch.seq_lens,
                page_size=self.spec.page_size,
                scale=self.spec.scale,
                sliding_window=layer.sliding_window,
            )
        return prefill_attention(
            q,
            k_cache,
            v_cache,
            forward_batch.block_tables,
            self._starts,
            forward_batch.seq_lens,
            max_queries=self._max_queries,
            page_size=self.spec.page_size,
            scale=self.spec.scale,
            sliding_window=layer.sliding_window,
        )
