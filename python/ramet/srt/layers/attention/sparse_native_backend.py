"""Owns attention with a sparse index in PyTorch alone: for CPUs, and the reference for the kernels."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.layers.attention.base_attn_backend import AttentionLayer
from ramet.srt.layers.attention.sparse_backend import SparseBackend
from ramet.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

BLOCK_NBYTES = 64 << 20  # scores, or gathered rows, that there are at a time


class SparseNativeAttnBackend(SparseBackend, TorchNativeAttnBackend):
    """Scores the keys of one sequence after the other, and gathers the chosen rows of a few queries at a time."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if not self.begin_pass(forward_batch):
            super().init_forward_metadata(forward_batch)

    def choose(self, q: torch.Tensor, weights: torch.Tensor, layer_id: int, forward_batch: ForwardBatch) -> None:
        tokens, top_k = forward_batch.tokens, self.index.top_k
        all_keys = self.kv_pool.get_index_keys(layer_id)
        self.chosen = torch.zeros((len(q), top_k), dtype=torch.int32, device=q.device)
        firsts = tokens.first_tokens.tolist()
        for place, (row, end) in enumerate(zip(tokens.rows.tolist(), tokens.ends.tolist(), strict=True)):
            first, last = firsts[place], firsts[place + 1]
            positions = torch.arange(end, device=q.device)
            slots = self._slots(forward_batch.req_to_page[row], positions)
            if end <= top_k:
                self.chosen[first:last, :end] = slots
                continue
            keys = all_keys.index_select(0, slots).float()
            for part in _blocks(first, last, self.index.num_heads * end * 4):
                products = torch.matmul(q[part].float(), keys.T).mul_(self.index.head_dim**-0.5).relu_()
                scores = torch.matmul(weights[part].unsqueeze(1), products).squeeze(1)  # [tokens, end]
                unseen = positions > forward_batch.positions[part].unsqueeze(1)
                best = scores.masked_fill_(unseen, float("-inf")).topk(top_k).indices  # those that are seen come first
                self.chosen[part] = slots[best].int()

    def forward(self, q: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch) -> torch.Tensor:
        if not self.is_sparse:
            return super().forward(q, layer, forward_batch)
        rows, _ = self.kv_pool.get_kv_buffer(layer.layer_id)
        top_k, value_dim = self.index.top_k, self.spec.kv.value_dim
        out = q.new_empty((*q.shape[:2], value_dim))
        for part in _blocks(0, len(q), top_k * rows.shape[-1] * q.itemsize):
            seen = torch.arange(top_k, device=q.device) <= forward_batch.positions[part].unsqueeze(1)
            chosen = self.chosen[part]
            slots = torch.where(seen, chosen, chosen[:, :1])  # what is not seen may be anything
            keys = rows.index_select(0, slots.flatten()).to(q.dtype).view(len(slots), 1, top_k, -1)
            queries = q[part].unsqueeze(1)  # [tokens, 1, num_heads, row_dim]
            mask = self._mask(seen)[:, None, None, :]
            sums = F.scaled_dot_product_attention(queries, keys, keys, attn_mask=mask, scale=self.spec.scale)
            out[part] = sums.squeeze(1)[..., :value_dim]
        return out


def _blocks(first: int, last: int, nbytes: int) -> Iterator[slice]:
    """Tokens from `first` to `last`, as many at a time as take BLOCK_NBYTES with so many bytes each."""
    size = max(1, BLOCK_NBYTES // nbytes)
    for start in range(first, last, size):
        yield slice(start, min(start + size, last))
