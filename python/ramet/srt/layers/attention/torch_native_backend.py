"""Owns attention with PyTorch's own scaled dot product: the backend for CPUs and the reference for all others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer, AttentionSpec
from ramet.srt.mem_cache.memory_pool import TokenToKVPool
from ramet.srt.utils.device import to_device

MAX_PADDING = 1.5  # single tokens attend together while their padded keys are at most this multiple of the real ones
GATHERED_NBYTES = 2 << 20  # keys and values gathered at once for each thread: what a core's own cache holds
MIN_SHARED_NBYTES = 2 << 20  # a common prefix is read once if that saves so much; to combine costs about that

Places: TypeAlias = slice | torch.Tensor  # tokens of the pass: side by side, or int64 [num_tokens]


@dataclass
class _Chunk:
    """What several new tokens of one sequence attend to."""

    queries: slice  # tokens of the pass
    slots: torch.Tensor  # int64 [num_keys]: cache slots of its keys
    mask: torch.Tensor | None = None  # [num_queries, num_keys], added to the scores; None: causality alone decides


@dataclass
class _Together:
    """What single new tokens of sequences of similar lengths attend to."""

    queries: Places
    slots: torch.Tensor  # int64 [num_queries * max_len]
    mask: torch.Tensor | None  # [num_queries, 1, 1, max_len], added to the scores; None: the lengths are the same


@dataclass
class _Family:
    """What single new tokens of sequences with a common prefix attend to: that, and each to the keys behind it."""

    queries: Places
    slots: torch.Tensor  # int64 [num_tokens] of the prefix
    own: list[_Together]  # their queries are places among those of the family


class _Single(NamedTuple):
    """A sequence with one new token."""

    sequence: int  # of the pass
    query: int  # place of the token among those that attend
    row: int  # of the page table
    begin: int  # the oldest token that it sees
    end: int


class TorchNativeAttnBackend(AttentionBackend):
    """Gathers keys and values from their pages and calls scaled_dot_product_attention."""

    def __init__(self, spec: AttentionSpec, kv_pool: TokenToKVPool):
        super().__init__(spec, kv_pool)
        self._sinks: torch.Tensor | None = None  # float32 [kv_heads, group], of the layer that is computed
        self._plans: dict[int | None, list[_Chunk | _Together | _Family]] = {}  # by window
        self._key_nbytes = spec.kv.bytes_per_token(spec.kv_dtype)

    @staticmethod
    def maps_windows(_spec: AttentionSpec) -> bool:
        return True

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        windowed = forward_batch.of_windows(self.spec.page_size)
        self._plans = {
            window: self._plan(forward_batch if window is None else windowed, window) for window in self.spec.windows
        }

    def forward(self, q: torch.Tensor, layer: AttentionLayer, _forward_batch: ForwardBatch) -> torch.Tensor:
        keys, values = self.kv_pool.get_kv_buffer(layer.layer_id)
        self._sinks = None if layer.sinks is None else layer.sinks.float().view(self.spec.num_kv_heads, -1)
        if self.spec.kv.is_latent:
            values = keys  # gathered once; what is behind the values' columns is cut off in the end
        output = q.new_empty((*q.shape[:2], values.shape[-1]))
        for part in self._plans[layer.sliding_window]:
            queries = q[part.queries]
            if isinstance(part, _Chunk):
                output[part.queries] = self._attend_chunk(queries, keys, values, part)
            elif isinstance(part, _Together):
                output[part.queries] = self._attend_together(queries, keys, values, part)
            else:
                output[part.queries] = self._attend_family(queries, keys, values, part)
        return output[..., : self.spec.kv.value_dim]

    def _plan(self, batch: ForwardBatch, window: int | None) -> list[_Chunk | _Together | _Family]:
        tokens = batch.tokens
        firsts = tokens.first_tokens.tolist()
        plan: list[_Chunk | _Together | _Family] = []
        singles: dict[int, _Single] = {}  # by sequence
        sequences = np.stack([tokens.rows, tokens.starts, tokens.ends], axis=1).tolist()
        for index, (row, start, end) in enumerate(sequences):
            begin = 0 if window is None else max(0, start + 1 - window)  # the oldest token that any query sees
            if end - start == 1:
                singles[index] = _Single(index, firsts[index], row, begin, end)
            else:
                plan.append(self._plan_chunk(batch, slice(firsts[index], firsts[index + 1]), row, begin, end, window))
        if self.spec.device.type == "cpu" and self.spec.soft_cap is None:
            # Otherwise no function gives what results are combined by.
            plan += self._take_families(batch, singles)
        return plan + self._plan_together(batch, list(singles.values()))

    def _plan_chunk(
        self, batch: ForwardBatch, queries: slice, row: int, begin: int, end: int, window: int | None
    ) -> _Chunk:
        prefix = end - (queries.stop - queries.start)
        if prefix == 0 and (window is None or end <= window):
            return _Chunk(queries, batch.out_cache_loc[queries])
        positions = torch.arange(begin, end, device=self.spec.device)
        query_positions = torch.arange(prefix, end, device=self.spec.device).unsqueeze(1)
        visible = positions <= query_positions
        if window is not None:
            visible &= positions > query_positions - window
        return _Chunk(queries, self._slots(batch.req_to_page[row], positions), self._mask(visible))

    def _take_families(self, batch: ForwardBatch, singles: dict[int, _Single]) -> list[_Family]:
        """Families among the single tokens, which are taken out there."""
        families = []
        for prefix in batch.tokens.shared:
            first, num_sequences, num_tokens = prefix.first, prefix.num_sequences, prefix.num_tokens
            members = [singles[index] for index in range(first, first + num_sequences) if index in singles]
            members = [member for member in members if member.begin == 0]
            if (len(members) - 1) * num_tokens * self._key_nbytes < MIN_SHARED_NBYTES:
                continue
            for member in members:
                del singles[member.sequence]
            positions = torch.arange(num_tokens, device=self.spec.device)
            slots = self._slots(batch.req_to_page[members[0].row], positions)
            own = [member._replace(query=place, begin=num_tokens) for place, member in enumerate(members)]
            queries = self._places([member.query for member in members])
            families.append(_Family(queries, slots, self._plan_together(batch, own)))
        return families

    def _plan_together(self, batch: ForwardBatch, singles: Sequence[_Single]) -> list[_Together]:
        most = None  # on a GPU, where launches count
        if self.spec.device.type == "cpu":
            most = GATHERED_NBYTES * torch.get_num_threads() // self._key_nbytes
        groups = group_by_length([single.end - single.begin for single in singles], most)
        return [self._plan_group(batch, [singles[index] for index in group]) for group in groups]

    def _plan_group(self, batch: ForwardBatch, group: Sequence[_Single]) -> _Together:
        numbers = np.array([(single.row, single.begin, single.end - single.begin) for single in group]).T
        rows, begins, num_keys = to_device(numbers, torch.int64, self.spec.device).unsqueeze(-1)  # [len(group), 1]
        longest, shortest = int(numbers[2, 0]), int(numbers[2, -1])
        offsets = torch.arange(longest, device=self.spec.device)
        mask = None
        if shortest < longest:
            is_key = offsets < num_keys
            mask = self._mask(is_key)[:, None, None, :]
            offsets = offsets.where(is_key, 0)  # padding reads what the token sees
        positions = begins + offsets
        pages = batch.req_to_page[rows, positions // self.spec.page_size]
        slots = pages * self.spec.page_size + positions % self.spec.page_size
        return _Together(self._places([single.query for single in group]), slots.flatten(), mask)

    def _places(self, queries: list[int]) -> Places:
        first, number = queries[0], len(queries)
        if queries == list(range(first, first + number)):
            return slice(first, first + number)
        return to_device(queries, torch.int64, self.spec.device)

    def _slots(self, pages: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return pages[positions // self.spec.page_size] * self.spec.page_size + positions % self.spec.page_size

    def _mask(self, visible: torch.Tensor) -> torch.Tensor:
        """What is added to the scores: made once a pass, where a boolean mask is translated by each layer."""
        mask = torch.zeros(visible.shape, dtype=self.spec.dtype, device=visible.device)
        return mask.masked_fill_(~visible, float("-inf"))

    def _attend_chunk(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
        """[num_queries, num_heads, head_dim] -> like q. KV heads are batch entries, their query heads are heads."""
        num_kv_heads, group = self.spec.num_kv_heads, self.spec.num_heads // self.spec.num_kv_heads
        q = q.unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)  # [kv_heads, group, queries, head_dim]
        k, v = (part[0].unsqueeze(1).expand(-1, group, -1, -1) for part in self._gather(keys, values, chunk.slots, 1))
        sinks = None if self._sinks is None else self._sinks.unsqueeze(-1)
        out = self._attend(q, k, v, chunk.mask, sinks, is_causal=chunk.mask is None)
        return out.permute(2, 0, 1, 3).flatten(1, 2)

    def _attend_together(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: _Together
    ) -> torch.Tensor:
        """One query for each sequence, [num_queries, num_heads, head_dim] -> like q.

        The query heads that share a KV head are its queries, so no key is read twice.
        """
        k, v = self._gather(keys, values, part.slots, len(q))
        q = q.unflatten(1, (self.spec.num_kv_heads, -1))  # [num_queries, kv_heads, group, head_dim]
        return self._attend(q, k, v, part.mask, self._sinks).flatten(1, 2)

    def _gather(
        self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, num_sequences: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [num_slots, kv_heads, columns] -> [num_sequences, kv_heads, num_keys, columns] of the slots, like q."""

        def gather(cache: torch.Tensor) -> torch.Tensor:
            gathered = cache.index_select(0, slots).to(self.spec.dtype)
            return gathered.unflatten(0, (num_sequences, -1)).transpose(1, 2)

        k = gather(keys)
        return k, k if values is keys else gather(values)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        sinks: torch.Tensor | None,
        *,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """scaled_dot_product_attention, with the soft cap and the sinks that it doesn't have.

        Args:
            sinks: like q without its last dimension, or broadcast to that.
        """
        cap, scale = self.spec.soft_cap, self.spec.scale
        if cap is None and sinks is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
        if cap is None and q.device.type == "cpu":
            out, weights = self._attend_with_weights(q, k, v, mask, is_causal=is_causal)
            return _with_sinks(out, weights, sinks)
        scores = (q @ k.transpose(-1, -2)).float() * scale
        if cap is not None:
            scores = (scores / cap).tanh_() * cap
        if is_causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
            scores = scores.masked_fill_(hidden, float("-inf"))
        elif mask is not None:
            scores = scores + mask
        return _with_sinks(scores.softmax(-1).to(q.dtype) @ v, scores.logsumexp(-1), sinks)

    def _attend_family(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: _Family) -> torch.Tensor:
        """Like `_attend_together`: the prefix with the queries of all, each one's own keys, and both results combined.

        With the prefix, the query heads of all are queries of their KV head (cascade inference; Ye et al., 2024).
        """
        q = q.unflatten(1, (self.spec.num_kv_heads, -1))  # [num_queries, kv_heads, group, head_dim]
        own, own_weight = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        for group in part.own:
            q_own = q[group.queries]
            k, v = self._gather(keys, values, group.slots, len(q_own))
            own[group.queries], own_weight[group.queries] = self._attend_with_weights(q_own, k, v, group.mask)
        rows = q.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # [1, kv_heads, num_queries * group, head_dim]
        results = self._attend_with_weights(rows, *self._gather(keys, values, part.slots, 1))
        out, weight = (result[0].unflatten(1, (len(q), -1)).transpose(0, 1) for result in results)
        share = torch.sigmoid(own_weight - weight).unsqueeze(-1)  # of the own keys
        combined = torch.lerp(out.float(), own.float(), share).to(q.dtype)
        return _with_sinks(combined, torch.logaddexp(own_weight, weight), self._sinks).flatten(1, 2)

    def _attend_with_weights(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The function behind scaled_dot_product_attention on CPUs, which gives float32 log-sum-exps too."""
        out, weights = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=is_causal, attn_mask=mask, scale=self.spec.scale
        )
        return out, weights


def group_by_length(lengths: Sequence[int], most: int | None) -> list[list[int]]:
    """Which of the sequences attend together: those of similar lengths, the longest first.

    Args:
        most: padded keys of a group, unless it is of one sequence; None: any number.
    """
    groups: list[list[int]] = []
    longest = num_keys = 0  # of the last group
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        padded = longest * (len(groups[-1]) + 1) if groups else 0
        if groups and padded <= MAX_PADDING * (num_keys + lengths[index]) and (most is None or padded <= most):
            groups[-1].append(index)
            num_keys += lengths[index]
        else:
            groups.append([index])
            longest = num_keys = lengths[index]
    return groups


def _with_sinks(out: torch.Tensor, weights: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """What attention gives with a score more in each softmax, whose weight goes to no value.

    Args:
        weights: the log of the sum of the others' weights, like `out` without its last dimension.
    """
    return out if sinks is None else out * torch.sigmoid(weights - sinks).unsqueeze(-1).to(out.dtype)
