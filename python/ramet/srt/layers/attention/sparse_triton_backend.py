"""Owns attention with a sparse index by Ramet's Triton kernels: scores, the choice, and attention to what is chosen.

What these need is on the device: nothing is cut on the host, and a captured pass reads the lengths of its replay.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.layers.attention.base_attn_backend import AttentionLayer, CapturedShape
from ramet.srt.layers.attention.latent_triton_backend import LatentTritonAttnBackend
from ramet.srt.layers.attention.sparse_backend import SparseBackend
from ramet.srt.layers.kernels.choose_keys import choose_keys
from ramet.srt.layers.kernels.index_scores import index_scores
from ramet.srt.layers.kernels.sparse_attention import count_pieces, sparse_attention
from ramet.srt.utils.device import to_device

SCORES_NBYTES = 128 << 20  # scores that there are at a time, unless one token's are more
STEP = 64  # a multiple of which are the scores of a token, so that kernels are not compiled anew


class SparseTritonAttnBackend(SparseBackend, LatentTritonAttnBackend):
    """Passes where all queries see few keys are cut as by its base, if they are launched, and long chunks of such few.

    Captured passes choose, unless no sequence can have so many keys.
    """

    _captures_choice = False

    _rows: torch.Tensor  # int64 [num_tokens], of the page table
    _starts: torch.Tensor  # see sparse_attention
    _num_pieces: int

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if not self.begin_pass(forward_batch):
            super().init_forward_metadata(forward_batch)
            return
        tokens = forward_batch.tokens
        others: PassTokens | None = tokens
        self.expanded, self._positions = None, forward_batch.positions
        if not forward_batch.is_captured:
            others = self._expand(forward_batch)
        assert others is not None, "what needs a choice is not expanded"
        num_tokens = others.num_tokens
        self._rows = forward_batch.rows
        if not forward_batch.is_captured and not tokens.is_decode:
            self._rows = to_device(tokens.row_of_token, torch.int64, self.spec.device)
        self._num_keys = -(-int(tokens.ends.max()) // STEP) * STEP
        kinds = self.spec.device, self.spec.dtype
        self._num_pieces = step = count_pieces(num_tokens, self.spec.num_heads, self.index.top_k, *kinds)
        self._starts = torch.arange(0, (num_tokens + 1) * step, step, dtype=torch.int32, device=self.spec.device)

    def init_cuda_graph_state(self, shapes: Sequence[CapturedShape], req_to_page: torch.Tensor) -> None:
        self._captures_choice = req_to_page.shape[1] * self.spec.page_size > self.index.top_k
        if not self._captures_choice:
            super().init_cuda_graph_state(shapes, req_to_page)

    def init_forward_metadata_replay_cuda_graph(
        self, shape: CapturedShape, tokens: PassTokens, rows: torch.Tensor
    ) -> None:
        self.expanded = None
        if not self._captures_choice:
            super().init_forward_metadata_replay_cuda_graph(shape, tokens, rows)

    def _find_expanded(self, tokens: PassTokens) -> np.ndarray:
        few_keys: np.ndarray = tokens.ends <= self.index.top_k
        return super()._find_expanded(tokens) & few_keys

    def choose(self, q: torch.Tensor, weights: torch.Tensor, layer_id: int, forward_batch: ForwardBatch) -> None:
        keys, table, num_tokens = self.kv_pool.get_index_keys(layer_id), forward_batch.req_to_page, len(q)
        size, page_size = max(1, min(num_tokens, SCORES_NBYTES // (4 * self._num_keys))), self.spec.page_size
        self.chosen = torch.empty((num_tokens, self.index.top_k), dtype=torch.int32, device=q.device)
        scores = torch.empty((size, self._num_keys), dtype=torch.float32, device=q.device)
        for first in range(0, num_tokens, size):
            part = slice(first, first + size)
            rows, positions, chosen = self._rows[part], forward_batch.positions[part], self.chosen[part]
            sizes = {"top_k": self.index.top_k, "page_size": page_size}
            index_scores(q[part], weights[part], keys, table, rows, positions, scores, **sizes)
            choose_keys(scores, table, rows, positions, chosen, page_size=page_size)

    def forward(self, q: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch) -> torch.Tensor:
        if not self.is_sparse:
            return super().forward(q, layer, forward_batch)
        rows, _ = self.kv_pool.get_kv_buffer(layer.layer_id)
        return sparse_attention(
            q,
            rows,
            self.spec.kv.value_dim,
            self.chosen if self.expanded is None else self.chosen[self.expanded.other_places],
            self._positions,
            self._starts,
            self._num_pieces,
            scale=self.spec.scale,
        )
