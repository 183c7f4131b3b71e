"""Owns attention over latent rows by a library, where one was asked for or measured to be faster than Ramet's kernels.

What the library doesn't take is computed by those: long prompt chunks, and with FlashMLA all passes with chunks.
"""

from collections.abc import Sequence

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.layers.attention.base_attn_backend import AttentionLayer, AttentionSpec, CapturedShape
from ramet.srt.layers.attention.latent_triton_backend import LatentTritonAttnBackend
from ramet.srt.layers.attention.rows.base import RowsAttention
from ramet.srt.layers.attention.rows.choice import choose_library
from ramet.srt.layers.attention.rows.flash_mla_rows import FlashMlaRows
from ramet.srt.layers.attention.rows.flashinfer_rows import FlashInferRows
from ramet.srt.mem_cache.memory_pool import TokenToKVPool
from ramet.srt.utils.device import to_device


class LatentLibraryBackend(LatentTritonAttnBackend):
    """Begins with Ramet's kernels, and takes the library that `choose_at_start` finds to be faster, if any."""

    def __init__(self, spec: AttentionSpec, kv_pool: TokenToKVPool):
        super().__init__(spec, kv_pool)
        self.library: RowsAttention | None = None
        self._by_library = False  # whether it computes the pass under way

    def choose_at_start(self) -> None:
        self.library = choose_library(self.spec)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        library = self.library
        if forward_batch.is_captured:
            if self._by_library and library is not None:
                library.begin_captured(forward_batch)
            return
        tokens = self._expand(forward_batch)
        self._by_library = False
        if tokens is None:
            return
        if library is None or not (library.takes_chunks or tokens.is_decode):
            self._cut(tokens, with_chunks=True)
            return
        self._by_library = True
        rows = forward_batch.rows
        if tokens is not forward_batch.tokens:
            rows = to_device(tokens.rows, torch.int64, self.spec.device)
        library.plan(tokens, rows, forward_batch.req_to_page)

    def init_cuda_graph_state(self, shapes: Sequence[CapturedShape], req_to_page: torch.Tensor) -> None:
        if self.library is not None:
            self.library.init_captured([shape.num_tokens for shape in shapes if not shape.has_chunks], req_to_page)
            shapes = [shape for shape in shapes if shape.has_chunks]
        super().init_cuda_graph_state(shapes, req_to_page)

    def init_forward_metadata_replay_cuda_graph(
        self, shape: CapturedShape, tokens: PassTokens, rows: torch.Tensor
    ) -> None:
        self._by_library = self.library is not None and not shape.has_chunks
        if self._by_library and self.library is not None:
            self.expanded = None
            self.library.plan_captured(shape.num_tokens, tokens, rows)
        else:
            super().init_forward_metadata_replay_cuda_graph(shape, tokens, rows)

    def forward(self, q: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch) -> torch.Tensor:
        if not self._by_library or self.library is None:
            return super().forward(q, layer, forward_batch)
        cache, _ = self.kv_pool.get_kv_buffer(layer.layer_id)
        out = torch.empty((*q.shape[:2], self.spec.kv.value_dim), dtype=q.dtype, device=q.device)
        self.library.run(q, cache, out)
        return out


class FlashMlaAttnBackend(LatentLibraryBackend):
    """With FlashMLA, whatever is faster."""

    def __init__(self, spec: AttentionSpec, kv_pool: TokenToKVPool):
        super().__init__(spec, kv_pool)
        self.library = FlashMlaRows(spec)

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        return FlashMlaRows.obstacle(spec) or LatentTritonAttnBackend.obstacle(spec)


class LatentFlashInferAttnBackend(LatentLibraryBackend):
    """With FlashInfer, whatever is faster."""

    def __init__(self, spec: AttentionSpec, kv_pool: TokenToKVPool):
        super().__init__(spec, kv_pool)
        self.library = FlashInferRows(spec)

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        return FlashInferRows.obstacle(spec) or LatentTritonAttnBackend.obstacle(spec)
