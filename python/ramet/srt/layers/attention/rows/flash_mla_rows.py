"""Owns latent attention of decoding requests through FlashMLA's kernel for Hopper."""

import importlib
from typing import Any

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.layers.attention.base_attn_backend import AttentionSpec
from ramet.srt.layers.attention.requirements import missing_package
from ramet.srt.layers.attention.rows.base import RANK, RowsAttention, common_obstacle
from ramet.srt.utils.device import to_device

PAGE_SIZE = 64  # tokens of a block of its table


class FlashMlaRows(RowsAttention):
    """flash_mla_with_kvcache (FlashMLA, flash_mla/flash_mla_interface.py), whose schedule is made on the GPU.

    Some versions make it when the first layer runs, so that each pass must begin with a new one.
    """

    name = "flash_mla"

    @staticmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        obstacle = common_obstacle(spec, torch.bfloat16)
        if obstacle is not None:
            return obstacle
        if torch.cuda.get_device_capability(spec.device)[0] != 9:
            return "a GPU of compute capability 9"
        if spec.page_size != PAGE_SIZE:
            return f"--page-size {PAGE_SIZE}; it is {spec.page_size}"
        obstacle = missing_package("flash_mla")
        if obstacle is not None:
            return obstacle
        try:
            importlib.import_module("flash_mla")
        except ImportError as error:
            return f"the package flash_mla, which can't be imported ({error})"
        return None

    def __init__(self, spec: AttentionSpec):
        super().__init__(spec)
        library: Any = importlib.import_module("flash_mla")
        self._attend = library.flash_mla_with_kvcache
        self._make_schedule = library.get_mla_metadata
        self._ends: torch.Tensor  # int32 [num_sequences]: tokens in the cache
        self._table: torch.Tensor  # int32 [num_sequences, max_pages]
        self._schedule: tuple[Any, Any]

    def plan(self, tokens: PassTokens, rows: torch.Tensor, table: torch.Tensor) -> None:
        num_pages = -(-int(tokens.ends.max()) // PAGE_SIZE)
        ends = to_device(tokens.ends, torch.int32, table.device)
        self._begin(ends, table[:, :num_pages].index_select(0, rows))

    def begin_captured(self, forward_batch: ForwardBatch) -> None:
        ends = (forward_batch.positions + 1).to(torch.int32)
        self._begin(ends, forward_batch.req_to_page.index_select(0, forward_batch.rows))

    def _begin(self, ends: torch.Tensor, table: torch.Tensor) -> None:
        self._ends, self._table = ends, table.to(torch.int32)
        self._schedule = self._make_schedule(ends, self.spec.num_heads, 1)

    def run(self, q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> None:
        result, _ = self._attend(
            q.unsqueeze(1),
            cache.unflatten(0, (-1, PAGE_SIZE)),
            self._table,
            self._ends,
            RANK,
            *self._schedule,
            softmax_scale=self.spec.scale,
        )
        out.copy_(result.squeeze(1))
