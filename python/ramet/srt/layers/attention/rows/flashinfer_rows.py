"""Owns latent attention through FlashInfer's wrapper for paged rows, planned on the host ahead of a pass."""

import importlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.layers.attention.base_attn_backend import AttentionSpec
from ramet.srt.layers.attention.flashinfer_backend import Planned, list_pages, on_host
from ramet.srt.layers.attention.requirements import missing_package
from ramet.srt.layers.attention.rows.base import RANK, ROPE, RowsAttention, common_obstacle

WORKSPACE_NBYTES = 128 << 20  # for the partial results of split sequences; all wrappers share it


class FlashInferRows(RowsAttention):
    """BatchMLAPagedAttentionWrapper (flashinfer/mla.py): one for launched passes, and one for each captured size."""

    name = "flashinfer"
    compiles = True
    takes_chunks = True

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        obstacle = common_obstacle(spec, torch.bfloat16, torch.float16) or missing_package("flashinfer")
        if obstacle is not None:
            return obstacle
        try:
            importlib.import_module("flashinfer.mla")
        except ImportError as error:
            return f"the package flashinfer, which can't be imported ({error})"
        return None

    def __init__(self, spec: AttentionSpec):
        super().__init__(spec)
        self._make: Any = importlib.import_module("flashinfer.mla").BatchMLAPagedAttentionWrapper
        self._workspace = torch.zeros(WORKSPACE_NBYTES, dtype=torch.uint8, device=spec.device)
        self._current = self._launched = Planned(self._make(self._workspace), spec.device)
        self._captured: dict[int, Planned] = {}  # by the number of tokens
        self._table: torch.Tensor  # of captured passes

    def plan(self, tokens: PassTokens, rows: torch.Tensor, table: torch.Tensor) -> None:
        self._current = self._launched
        self._plan(tokens, rows, table)

    def init_captured(self, sizes: Sequence[int], table: torch.Tensor) -> None:
        largest, device = max(sizes, default=0), self.spec.device
        self._table = table

        def make(length: int) -> torch.Tensor:
            return torch.zeros(length, dtype=torch.int32, device=device)

        # The graphs run one at a time, so they share the places that a plan is copied to.
        query_starts, starts, lengths = make(largest + 1), make(largest + 1), make(largest)
        indices = make(largest * table.shape[1])
        for size in sizes:
            wrapper = self._make(
                self._workspace,
                use_cuda_graph=True,
                qo_indptr=query_starts[: size + 1],
                kv_indptr=starts[: size + 1],
                kv_indices=indices,
                kv_len_arr=lengths[:size],
            )
            self._captured[size] = Planned(wrapper, device)

    def plan_captured(self, size: int, tokens: PassTokens, rows: torch.Tensor) -> None:
        self._current = self._captured[size]
        self._plan(tokens, rows, self._table)

    def _plan(self, tokens: PassTokens, rows: torch.Tensor, table: torch.Tensor) -> None:
        spec, lengths = self.spec, tokens.ends.tolist()
        pages = list_pages(spec, table, rows, lengths)
        self._current.plan(
            on_host(spec, list(accumulate(tokens.lens.tolist(), initial=0))),
            pages.starts,
            pages.indices,
            on_host(spec, lengths),
            spec.num_heads,
            RANK,
            ROPE,
            spec.page_size,
            True,  # causal
            spec.scale,
            spec.dtype,
            spec.dtype,
        )

    def run(self, q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> None:
        pages = cache.squeeze(1).unflatten(0, (-1, self.spec.page_size))
        queries, keys = q.split([RANK, ROPE], dim=-1), pages.split([RANK, ROPE], dim=-1)
        self._current.wrapper.run(*queries, *keys, out=out)
