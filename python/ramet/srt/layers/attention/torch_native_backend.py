"""Owns attention with PyTorch's own scaled dot product: the backend for CPUs and the reference for all others."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ramet.srt.batch.forward_batch_info import ForwardBatch, ForwardMode
from ramet.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionSpec

if TYPE_CHECKING:
    from ramet.srt.layers.attention.radix_attention import RadixAttention

MAX_PADDING = 1.5  # decode together while the padded cache is at most this multiple of the real one


@dataclass
class _Sequence:
    """What one sequence of the pass attends to, for one window size."""

    queries: slice  # its new tokens in the batch
    slots: torch.Tensor | None  # int64 [num_keys]: cache slots of its keys; None when they are all in this pass
    mask: torch.Tensor | None  # bool [num_queries, num_keys]; None with `slots` None means causal, else everything


@dataclass
class _Padded:
    """What a decode batch of similar lengths attends to together, for one window size."""

    slots: torch.Tensor  # int64 [batch_size * max_len]
    mask: torch.Tensor | None  # bool [batch_size, 1, 1, max_len]


class TorchNativeAttnBackend(AttentionBackend):
    """Gathers keys and values from their pages and calls scaled_dot_product_attention."""

    def __init__(self, spec: AttentionSpec):
        super().__init__(spec)
        self.page_size = spec.page_size
        self._plans: dict[int | None, _Padded | list[_Sequence]] = {}

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._plans = {}

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: "RadixAttention",
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        plan = self._plans.get(layer.sliding_window)
        if plan is None:
            plan = self._plans[layer.sliding_window] = self._plan(forward_batch, layer.sliding_window)
        keys, values = forward_batch.kv_pool.get_kv_buffer(layer.layer_id)
        if isinstance(plan, _Padded):
            return _attend_padded(q, keys, values, plan, layer)
        output = torch.empty_like(q)
        for sequence in plan:
            if sequence.slots is None:
                sequence_k, sequence_v = k[sequence.queries], v[sequence.queries]
            else:
                sequence_k, sequence_v = keys[sequence.slots], values[sequence.slots]
            output[sequence.queries] = _attend(q[sequence.queries], sequence_k, sequence_v, sequence, layer)
        return output

    def _plan(self, batch: ForwardBatch, window: int | None) -> "_Padded | list[_Sequence]":
        if batch.forward_mode is ForwardMode.DECODE:
            visible = [min(length, window or length) for length in batch.seq_lens_cpu]
            if len(visible) > 1 and max(visible) * len(visible) <= MAX_PADDING * sum(visible):
                return self._plan_padded(batch, visible)
        plan = []
        start = 0
        for index, (new, length) in enumerate(zip(batch.extend_lens_cpu, batch.seq_lens_cpu, strict=True)):
            plan.append(self._plan_sequence(batch, index, slice(start, start + new), length, window))
            start += new
        return plan

    def _plan_sequence(
        self, batch: ForwardBatch, index: int, queries: slice, length: int, window: int | None
    ) -> _Sequence:
        new = queries.stop - queries.start
        prefix = length - new
        if prefix == 0 and (window is None or length <= window):
            return _Sequence(queries, None, None)
        first = max(0, prefix + 1 - window) if window else 0  # the oldest token that any query sees
        positions = torch.arange(first, length, device=batch.block_tables.device)
        slots = self._slots(batch.block_tables[index], positions)
        if new == 1:
            return _Sequence(queries, slots, None)
        query_positions = torch.arange(prefix, length, device=positions.device).unsqueeze(1)
        mask = positions <= query_positions
        if window is not None:
            mask &= positions > query_positions - window
        return _Sequence(queries, slots, mask)

    def _plan_padded(self, batch: ForwardBatch, visible: list[int]) -> _Padded:
        num_keys = torch.tensor(visible, device=batch.block_tables.device).unsqueeze(1)  # [batch_size, 1]
        offsets = torch.arange(max(visible), device=batch.block_tables.device)  # [max_len]
        valid = offsets < num_keys
        positions = (batch.seq_lens.unsqueeze(1) - num_keys + offsets).masked_fill(~valid, 0)
        slots = torch.gather(batch.block_tables, 1, positions // self.page_size) * self.page_size
        slots = slots + positions % self.page_size
        mask = None if min(visible) == max(visible) else valid[:, None, None, :]
        return _Padded(slots.flatten(), mask)

    def _slots(self, pages: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return pages[positions // self.page_size] * self.page_size + positions % self.page_size


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequence: _Sequence, layer: "RadixAttention"
) -> torch.Tensor:
    """q [num_queries, num_heads, head_dim], k and v [num_keys, num_kv_heads, head_dim] -> like q.

    Each KV head is a batch entry, the query heads that share it are its heads.
    """
    group = layer.num_heads // layer.num_kv_heads
    q = q.unflatten(1, (layer.num_kv_heads, group)).permute(1, 2, 0, 3)  # [kv_heads, group, queries, head_dim]
    k = k.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    v = v.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    is_causal = sequence.slots is None and q.shape[2] > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=sequence.mask, is_causal=is_causal, scale=layer.scale)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def _attend_padded(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: _Padded, layer: "RadixAttention"
) -> torch.Tensor:
    """One query for each sequence, [batch_size, num_heads, head_dim] -> like q.

    The query heads that share a KV head are its queries, so no key is read twice.
    """
    batch_size = q.shape[0]
    q = q.unflatten(1, (layer.num_kv_heads, -1))  # [batch_size, kv_heads, group, head_dim]
    k = keys[plan.slots].unflatten(0, (batch_size, -1)).transpose(1, 2)  # [batch_size, kv_heads, max_len, head_dim]
    v = values[plan.slots].unflatten(0, (batch_size, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask, scale=layer.scale).flatten(1, 2)
