"""Owns prompt chunks through FlashAttention 3, by the module flash_attn_interface."""

import importlib
import importlib.util
from typing import Any

import torch

from ramet.srt.layers.attention.base_attn_backend import AttentionSpec, PassLimits
from ramet.srt.layers.attention.prompts.base import PromptAttention, PromptChunks
from ramet.srt.utils.device import to_device


class FlashPrompts(PromptAttention):
    """flash_attn_with_kvcache with ragged queries and a page table (FlashAttention, hopper/flash_attn_interface.py)."""

    name = "flash_attention_3"

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        if spec.device.type != "cuda" or torch.cuda.get_device_capability(spec.device)[0] != 9:
            return "a GPU of compute capability 9"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return "bfloat16 or float16"
        if spec.has_sinks:
            return "a model without attention sinks"
        if spec.has_fp8_cache:
            return "a KV cache in the model's type"
        if importlib.util.find_spec("flash_attn_interface") is None:
            return "the module flash_attn_interface, which is not installed"
        return None

    def __init__(self, spec: AttentionSpec, _limits: PassLimits):
        interface: Any = importlib.import_module("flash_attn_interface")
        self._attend = interface.flash_attn_with_kvcache
        self._spec = spec
        self._max_tokens = 0
        self._places: torch.Tensor | slice  # of the chunks' tokens in the pass
        self._starts: torch.Tensor  # int32 [num_sequences + 1], among these tokens
        self._ends: torch.Tensor  # int32 [num_sequences]
        self._table: torch.Tensor  # int32 [num_sequences, max_pages]

    def plan(self, chunks: PromptChunks, req_to_page: torch.Tensor) -> None:
        device = req_to_page.device
        self._max_tokens = int(chunks.lens.max())
        self._starts = to_device(chunks.starts, torch.int32, device)
        self._ends = to_device(chunks.ends, torch.int32, device)
        rows = to_device(chunks.rows, torch.int64, device)
        num_pages = -(-int(chunks.ends.max()) // self._spec.page_size)
        self._table = req_to_page[:, :num_pages].index_select(0, rows).to(torch.int32)
        self._places = chunks.places(device)

    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, window: int | None, out: torch.Tensor
    ) -> None:
        pages = (-1, self._spec.page_size)
        out[self._places] = self._attend(
            q[self._places],
            k_cache.unflatten(0, pages),
            v_cache.unflatten(0, pages),
            cache_seqlens=self._ends,
            page_table=self._table,
            cu_seqlens_q=self._starts,
            max_seqlen_q=self._max_tokens,
            softmax_scale=self._spec.scale,
            causal=True,
            window_size=(-1 if window is None else window - 1, 0),
        )
