"""Owns what a single row is between layers that leave work to each other: sums to add up, a factor to multiply by.

A product of one row whose columns are spread over a GPU ends with adding up what its programs have. Waiting for the
last of them takes as long as reading a small matrix does: who reads the row next can add up just as well.
"""

from typing import NamedTuple, TypeAlias

import torch

from ramet.srt.layers.activation import Activation


class RowSums(NamedTuple):
    """One row, in parts of which it is the sum."""

    parts: torch.Tensor  # contiguous float32 [num_parts, size]
    dtype: torch.dtype  # of what they stand for

    def whole(self) -> torch.Tensor:
        """[1, size]."""
        return self.parts.sum(dim=0, keepdim=True).to(self.dtype)


class GatedSums(NamedTuple):
    """act(first half) * second half of a row."""

    row: RowSums
    activation: Activation


class UnscaledRow(NamedTuple):
    """One row before it is multiplied by a norm's 1 / sqrt(mean(x^2) + eps), which products can do in the end."""

    values: torch.Tensor  # contiguous [1, size], x times the norm's weight
    squares: torch.Tensor  # float32 [any], whose sum is that of x^2
    eps: float


UnfinishedRow: TypeAlias = torch.Tensor | UnscaledRow | GatedSums  # what `leave_sums` takes


def whole(x: torch.Tensor | RowSums) -> torch.Tensor:
    """[num_tokens, size]."""
    return x.whole() if isinstance(x, RowSums) else x
