"""Owns the interface of libraries that attend to latent rows, beside Ramet's own kernels."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.batch.pass_tokens import PassTokens
from ramet.srt.layers.attention.base_attn_backend import AttentionSpec

RANK, ROPE = 512, 64  # columns of a row that the libraries know: values, and what rotates


class RowsAttention(ABC):
    """Causal attention of a pass over the paged rows. Captured passes are those with one new token of each sequence."""

    name: str
    compiles = False  # for a minute or more, when it is first used
    takes_chunks = False  # sequences may have several new tokens

    def __init__(self, spec: AttentionSpec):
        """
        Raises:
            Exception: of the library, if it can't compute such a model after all.
        """
        self.spec = spec

    @staticmethod
    @abstractmethod
    def obstacle(spec: AttentionSpec) -> str | None:
        """What is missing to run such a model, as the end of "it needs ..."; None if nothing is."""

    @abstractmethod
    def plan(self, tokens: PassTokens, rows: torch.Tensor, table: torch.Tensor) -> None:
        """Prepare what the layers of a launched pass share.

        Args:
            rows: int64 [num_sequences], of the page table.
            table: int64 [num_rows, max_pages].
        """

    def init_captured(self, sizes: Sequence[int], table: torch.Tensor) -> None:  # noqa: B027  optional
        """Make what captured passes of so many tokens keep at fixed addresses; they read `table` at its place."""

    def plan_captured(self, size: int, tokens: PassTokens, rows: torch.Tensor) -> None:  # noqa: B027  optional
        """Prepare on the host the next captured pass, before its capture and before each replay.

        Args:
            rows: int64 [size], on the device.
        """

    def begin_captured(self, forward_batch: ForwardBatch) -> None:  # noqa: B027  optional
        """Prepare what the layers of a captured pass share; this is captured with the pass."""

    @abstractmethod
    def run(self, q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> None:
        """Write `out`, [num_tokens, num_heads, RANK].

        Args:
            q: [num_tokens, num_heads, RANK + ROPE], of the tokens that were planned.
            cache: [num_slots, 1, RANK + ROPE], with the rows of the pass.
        """


def common_obstacle(spec: AttentionSpec, *dtypes: torch.dtype) -> str | None:
    """What is missing to run such a model by any of the libraries."""
    if spec.device.type != "cuda":
        return "a GPU"
    if not spec.kv.is_latent:
        return "a model with latent attention"
    if spec.latent is not None and spec.latent.index is not None:
        return "a model without a sparse index"
    if (spec.kv.value_dim, spec.kv.key_dim - spec.kv.value_dim) != (RANK, ROPE):
        words = f"{spec.kv.value_dim} and {spec.kv.key_dim - spec.kv.value_dim}"
        return f"latent rows of {RANK} and {ROPE} columns; the model's have {words}"
    if spec.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"{names}; the model has {str(spec.dtype).removeprefix('torch.')}"
    return None
