"""Owns the interface of kernels that compute the prompt chunks of a long pass, beside Ramet's own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ramet.srt.layers.attention.base_attn_backend import AttentionSpec, PassLimits
from ramet.srt.utils.device import to_device


@dataclass(frozen=True)
class PromptChunks:
    """The sequences of a pass that are to be computed: int64 arrays on the host, one number for each."""

    rows: np.ndarray  # of the page table
    first: np.ndarray  # token of the pass
    lens: np.ndarray  # new tokens
    ends: np.ndarray  # tokens in the KV cache after the pass

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [num_sequences + 1]: where each sequence's tokens start among those of all, and the end of the last."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lens)])

    def places(self, device: torch.device) -> torch.Tensor | slice:
        """Where the tokens of all stand in the pass: a range, if nothing stands between them."""
        first, end = int(self.first[0]), int(self.first[-1] + self.lens[-1])
        if end - first == self.starts[-1]:
            return slice(first, end)
        places = np.arange(self.starts[-1]) + np.repeat(self.first - self.starts[:-1], self.lens)
        return to_device(places, torch.int64, device)

    def select(self, which: np.ndarray) -> "PromptChunks":
        """Those for which a bool array says so."""
        return PromptChunks(self.rows[which], self.first[which], self.lens[which], self.ends[which])

    def parts(self, size: int) -> "Sequence[PromptChunks]":
        """The same, so many sequences at a time."""
        fields = (self.rows, self.first, self.lens, self.ends)
        starts = range(0, len(self.rows), size)
        return [PromptChunks(*(field[start : start + size] for field in fields)) for start in starts]


class PromptAttention(ABC):
    """Causal attention of prompt chunks over the paged KV cache. Making one may take seconds: libraries compile."""

    name: str

    @staticmethod
    @abstractmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        """What is missing to run such a model; None if nothing is."""

    @abstractmethod
    def __init__(self, spec: AttentionSpec, limits: PassLimits):
        """
        Raises:
            Exception: of the library, if it can't compute such a model after all.
        """

    @abstractmethod
    def plan(self, chunks: PromptChunks, req_to_page: torch.Tensor) -> None:
        """Prepare what the layers of a pass share.

        Args:
            req_to_page: int64 [num_rows, max_pages].
        """

    @abstractmethod
    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, window: int | None, out: torch.Tensor
    ) -> None:
        """Write the chunks' tokens of `out`, [num_tokens, num_heads, head_dim] like q, and no others.

        Args:
            k_cache, v_cache: [num_slots, num_kv_heads, head_dim], with the keys and values of the pass.
        """
