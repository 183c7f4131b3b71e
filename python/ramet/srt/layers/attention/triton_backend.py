"""Owns attention with Ramet's Triton kernels: which kernel runs, and what the layers of a pass share."""

from typing import TYPE_CHECKING

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionSpec
from ramet.srt.layers.kernels.decode_attention import decode_attention
from ramet.srt.layers.kernels.prefill_attention import prefill_attention
from ramet.srt.layers.kernels.runtime import can_run_kernels
from ramet.srt.utils.device import to_device

if TYPE_CHECKING:
    from ramet.srt.layers.attention.radix_attention import RadixAttention


class TritonAttnBackend(AttentionBackend):
    """Reads keys and values where they lie; nothing is gathered. Decoding can be captured in a CUDA graph."""

    can_be_captured = True

    def __init__(self, spec: AttentionSpec):
        super().__init__(spec)
        self.page_size = spec.page_size
        self._starts: torch.Tensor | None = None  # int32 [batch_size + 1]
        self._max_queries = 0

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        return None if can_run_kernels(spec.device) else "a GPU"

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if forward_batch.forward_mode is ForwardMode.DECODE:
            return
        starts = [0]
        for length in forward_batch.extend_lens_cpu:
            starts.append(starts[-1] + length)
        self._starts = to_device(starts, torch.int32, forward_batch.seq_lens.device)
        self._max_queries = max(forward_batch.extend_lens_cpu, default=0)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: "RadixAttention",
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        k_cache, v_cache = forward_batch.kv_pool.get_kv_buffer(layer.layer_id)
        if forward_batch.forward_mode is ForwardMode.DECODE:
            return decode_attention(
                q,
                k_cache,
                v_cache,
                forward_batch.block_tables,
                forward_batch.seq_lens,
                page_size=self.page_size,
                scale=layer.scale,
                sliding_window=layer.sliding_window,
            )
        assert self._starts is not None, "init_forward_metadata was not called"
        return prefill_attention(
            q,
            k_cache,
            v_cache,
            forward_batch.block_tables,
            self._starts,
            forward_batch.seq_lens,
            max_queries=self._max_queries,
            page_size=self.page_size,
            scale=layer.scale,
            sliding_window=layer.sliding_window,
        )
