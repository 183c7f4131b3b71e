"""Owns the scales of fp8 weights as layers hold and use them: one for each row, or a grid of them for blocks."""

from typing import NamedTuple, TypeAlias

import torch
from torch import nn


class BlockIndex(NamedTuple):
    """Which element of a grid of scales multiplies which element of a rank's matrix.

    A rank's rows may come from several checkpoint matrices, and begin in the middle of a block of each.
    """

    rows: torch.Tensor  # int32 [num_rows]: the grid's row for each row of the matrix
    block_columns: int  # columns of the matrix that share a scale
    first_column: int  # the matrix' first column, counted from the first one of the grid's first block


class BlockScales(NamedTuple):
    """The scales of a matrix, or of a stack of equally cut ones."""

    values: torch.Tensor  # float32 [(num_matrices,) grid rows, grid columns]
    blocks: BlockIndex

    def of_matrix(self, place: int) -> "BlockScales":
        """Those of one matrix of a stack."""
        return BlockScales(self.values[place], self.blocks)


# Of rows: float32 [(num_matrices,) num_rows, 1]. None: the weight is not quantised.
Scales: TypeAlias = torch.Tensor | BlockScales | None


def scales_of(module: nn.Module, name: str) -> Scales:
    """The scales of a module's weight `name`, as `declare_quantised` has declared them."""
    index = vars(module).get(f"{name}_blocks")
    if index is not None:
        return BlockScales(getattr(module, f"{name}_scale_inv"), index)
    return getattr(module, f"{name}_scale", None)


def scales_of_matrix(scales: Scales, place: int) -> Scales:
    """The scales of one matrix of a stack."""
    if scales is None:
        return None
    return scales.of_matrix(place) if isinstance(scales, BlockScales) else scales[place]
