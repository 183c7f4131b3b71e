"""Owns attention with PyTorch's own scaled dot product: the backend for CPUs and the reference for all others."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer, AttentionSpec
from ramet.srt.mem_cache.memory_pool import MHATokenToKVPool

MAX_PADDING = 1.5  # decode together while the padded cache is at most this multiple of the real one


@dataclass
class _Sequence:
    """What one sequence of the pass attends to, for one window size."""

    queries: slice  # its new tokens in the batch
    slots: torch.Tensor  # int64 [num_keys]: cache slots of its keys
    mask: torch.Tensor | None = None  # bool [num_queries, num_keys]; None: every key, or those that causality leaves
    is_causal: bool = False  # each query sees the keys up to its own place, of as many


@dataclass
class _Padded:
    """What a decode batch of similar lengths attends to together, for one window size."""

    slots: torch.Tensor  # int64 [batch_size * max_len]
    mask: torch.Tensor | None  # bool [batch_size, 1, 1, max_len]


class TorchNativeAttnBackend(AttentionBackend):
    """Gathers keys and values from their pages and calls scaled_dot_product_attention."""

    def __init__(self, spec: AttentionSpec, kv_pool: MHATokenToKVPool):
        super().__init__(spec, kv_pool)
        self._plans: dict[int | None, _Padded | list[_Sequence]] = {}  # by window

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._plans = {window: self._plan(forward_batch, window) for window in self.spec.windows}

    def forward(self, q: torch.Tensor, layer: AttentionLayer, _forward_batch: ForwardBatch) -> torch.Tensor:
        plan = self._plans[layer.sliding_window]
        keys, values = self.kv_pool.get_kv_buffer(layer.layer_id)
        if isinstance(plan, _Padded):
            return self._attend_padded(q, keys, values, plan)
        output = torch.empty_like(q)
        for sequence in plan:
            slots, queries = sequence.slots, sequence.queries
            output[queries] = self._attend(q[queries], keys[slots], values[slots], sequence)
        return output

    def _plan(self, batch: ForwardBatch, window: int | None) -> "_Padded | list[_Sequence]":
        if batch.forward_mode is ForwardMode.DECODE:
            visible = [min(length, window or length) for length in batch.seq_lens_cpu]
            if len(visible) > 1 and max(visible) * len(visible) <= MAX_PADDING * sum(visible):
                return self._plan_padded(batch, visible)
        tables = batch.block_tables(self.spec.page_size)
        plan = []
        start = 0
        for index, (new, length) in enumerate(zip(batch.extend_lens_cpu, batch.seq_lens_cpu, strict=True)):
            plan.append(self._plan_sequence(batch, tables[index], slice(start, start + new), length, window))
            start += new
        return plan

    def _plan_sequence(
        self, batch: ForwardBatch, pages: torch.Tensor, queries: slice, length: int, window: int | None
    ) -> _Sequence:
        new = queries.stop - queries.start
        prefix = length - new
        if prefix == 0 and (window is None or length <= window):
            return _Sequence(queries, batch.out_cache_loc[queries], is_causal=new > 1)
        first = max(0, prefix + 1 - window) if window else 0  # the oldest token that any query sees
        positions = torch.arange(first, length, device=pages.device)
        slots = self._slots(pages, positions)
        if new == 1:
            return _Sequence(queries, slots)
        query_positions = torch.arange(prefix, length, device=positions.device).unsqueeze(1)
        mask = positions <= query_positions
        if window is not None:
            mask &= positions > query_positions - window
        return _Sequence(queries, slots, mask)

    def _plan_padded(self, batch: ForwardBatch, visible: list[int]) -> _Padded:
        tables = batch.block_tables(self.spec.page_size)
        num_keys = torch.tensor(visible, device=tables.device).unsqueeze(1)  # [batch_size, 1]
        offsets = torch.arange(max(visible), device=tables.device)  # [max_len]
        valid = offsets < num_keys
        positions = (batch.seq_lens.unsqueeze(1) - num_keys + offsets).masked_fill(~valid, 0)
        slots = torch.gather(tables, 1, positions // self.spec.page_size) * self.spec.page_size
        slots = slots + positions % self.spec.page_size
        mask = None if min(visible) == max(visible) else valid[:, None, None, :]
        return _Padded(slots.flatten(), mask)

    def _slots(self, pages: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return pages[positions // self.spec.page_size] * self.spec.page_size + positions % self.spec.page_size

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequence: _Sequence) -> torch.Tensor:
        """q [num_queries, num_heads, head_dim], k and v [num_keys, num_kv_heads, head_dim] -> like q.

        Each KV head is a batch entry, the query heads that share it are its heads.
        """
        num_kv_heads, group = self.spec.num_kv_heads, self.spec.num_heads // self.spec.num_kv_heads
        q = q.unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)  # [kv_heads, group, queries, head_dim]
        k = k.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
        v = v.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=sequence.mask, is_causal=sequence.is_causal, scale=self.spec.scale
        )
        return out.permute(2, 0, 1, 3).flatten(1, 2)

    def _attend_padded(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: _Padded) -> torch.Tensor:
        """One query for each sequence, [batch_size, num_heads, head_dim] -> like q.

        The query heads that share a KV head are its queries, so no key is read twice.
        """
        batch_size = q.shape[0]
        q = q.unflatten(1, (self.spec.num_kv_heads, -1))  # [batch_size, kv_heads, group, head_dim]
        k = keys[plan.slots].unflatten(0, (batch_size, -1)).transpose(1, 2)  # [batch_size, kv_heads, max_len, head_dim]
        v = values[plan.slots].unflatten(0, (batch_size, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask, scale=self.spec.scale).flatten(1, 2)
