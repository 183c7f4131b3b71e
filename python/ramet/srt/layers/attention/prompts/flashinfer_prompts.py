"""Owns prompt chunks through FlashInfer's prefill over paged caches."""

import importlib
from typing import Any

import torch

from ramet.srt.layers.attention.base_attn_backend import AttentionSpec, PassLimits
from ramet.srt.layers.attention.flashinfer_backend import (
    FlashInferAttnBackend,
    Planned,
    list_pages,
    on_host,
    plan_wrappers,
)
from ramet.srt.layers.attention.prompts.base import PromptAttention, PromptChunks
from ramet.srt.utils.device import to_device

WORKSPACE_NBYTES = 128 << 20


class FlashInferPrompts(PromptAttention):
    """One wrapper for each window, planned on the host for every pass. The library compiles when it is first used."""

    name = "flashinfer"

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        return "a KV cache in the model's type" if spec.has_fp8_cache else FlashInferAttnBackend.obstacle(spec)

    def __init__(self, spec: AttentionSpec, _limits: PassLimits):
        flashinfer: Any = importlib.import_module("flashinfer")
        self._spec = spec
        workspace = torch.zeros(WORKSPACE_NBYTES, dtype=torch.uint8, device=spec.device)
        make = flashinfer.BatchPrefillWithPagedKVCacheWrapper
        self._wrappers = {window: Planned(make(workspace, kv_layout="NHD"), spec.device) for window in spec.windows}
        self._places: torch.Tensor | slice  # of the chunks' tokens in the pass

    def plan(self, chunks: PromptChunks, req_to_page: torch.Tensor) -> None:
        rows = to_device(chunks.rows, torch.int64, req_to_page.device)
        pages = list_pages(self._spec, req_to_page, rows, chunks.ends.tolist())
        plan_wrappers(self._spec, self._wrappers, pages, on_host(self._spec, chunks.starts.tolist()), causal=True)
        self._places = chunks.places(req_to_page.device)

    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, window: int | None, out: torch.Tensor
    ) -> None:
        pages = (-1, self._spec.page_size)
        caches = k_cache.unflatten(0, pages), v_cache.unflatten(0, pages)
        queries = q[self._places]
        result = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        self._wrappers[window].wrapper.run(queries, caches, out=result)
        out[self._places] = result
