"""Owns the interface of attention backends."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from ramet.srt.model_executor.forward_batch_info import ForwardBatch

if TYPE_CHECKING:
    from ramet.srt.layers.attention.radix_attention import RadixAttention


class AttentionBackend(ABC):
    """Computes attention over the paged KV cache for every layer of a forward pass."""

    can_be_captured = False  # whether a decode pass may be captured in a CUDA graph

    @abstractmethod
    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare what all layers of the pass share; called once before the model runs."""

    @abstractmethod
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: "RadixAttention",
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim] -> like q.

        The cache holds k and v of this pass already.
        """
