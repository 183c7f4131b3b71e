"""Owns what backends of attention with a sparse index have in common: which passes need a choice of keys, and it."""

from abc import abstractmethod

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.configs.index_config import IndexTraits
from ramet.srt.layers.attention.base_attn_backend import AttentionBackend


class SparseBackend(AttentionBackend):
    """Attends to the keys that the last layer with an index has chosen, in passes where a query sees more than those.

    Other passes attend to all keys, which is the same. In the order of inheritance it stands before a backend that
    does that.
    """

    is_sparse = False  # whether the pass under way needs a choice
    # int32 [num_tokens, top_k]: the slots of the cache that each query attends to; of one that sees fewer keys, as many
    # as it sees, and something behind them.
    chosen: torch.Tensor

    @property
    def index(self) -> IndexTraits:
        assert self.spec.latent is not None and self.spec.latent.index is not None
        return self.spec.latent.index

    @property
    def num_before_long(self) -> int:
        return self.index.top_k

    def begin_pass(self, forward_batch: ForwardBatch) -> bool:
        """Whether the pass needs a choice; the host knows, and with data-parallel attention of its own tokens."""
        self.is_sparse = int(forward_batch.tokens.ends.max()) > self.index.top_k
        return self.is_sparse

    @abstractmethod
    def choose(self, q: torch.Tensor, weights: torch.Tensor, layer_id: int, forward_batch: ForwardBatch) -> None:
        """Choose the keys of a pass that needs a choice; the index's keys of the pass are in the cache already.

        A key's score is the sum over heads of weight * max(0, q . key / sqrt(head_dim)).

        Args:
            q: [num_tokens, num_heads, head_dim] of the index, rotated.
            weights: float32 [num_tokens, num_heads].
            layer_id: whose keys of the index are scored.
        """
