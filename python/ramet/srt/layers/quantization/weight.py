"""Owns quantised weights as layers hold and use them: the tensors of their grids, and where each number's place is."""

import functools
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

from ramet.srt.configs.weight_format import WeightFormat


class GridIndex(NamedTuple):
    """Which element of a grid belongs to which element of a rank's matrix.

    A rank's rows may come from several checkpoint matrices, and begin in the middle of a block of each.
    """

    rows: torch.Tensor | None  # int32 [num_rows]: the grid's row for each row of the matrix; None: row // grid.rows
    columns: int  # of the matrix that an element covers
    first_column: int  # the matrix' first column, counted from the first one of the grid's first element
    is_regular: bool = False  # row // grid.rows, though `rows` says so for each

    def columns_of(self, num_columns: int, device: torch.device) -> torch.Tensor:
        """int64 [num_columns]: the grid's column for each column of the matrix."""
        columns = torch.arange(self.first_column, self.first_column + num_columns, device=device)
        return columns // self.columns


@dataclass(frozen=True, eq=False)
class WeightLayout:
    """What is known of a rank's quantised matrix, or of each matrix of a stack, before there are bytes."""

    format: WeightFormat
    num_rows: int
    num_columns: int
    indices: dict[str, GridIndex]  # by the format's fields

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        """What the names of a module's tensors have behind the weight's, by the format's fields."""
        return {role: grid.attribute for role, grid in self.format}


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A quantised matrix, or a stack of equally cut ones."""

    layout: WeightLayout
    tensors: dict[str, torch.Tensor]  # by the format's fields; a stack's have its number of matrices in front

    @property
    def format(self) -> WeightFormat:
        return self.layout.format

    @property
    def values(self) -> torch.Tensor:
        return self.tensors["values"]

    @property
    def scales(self) -> torch.Tensor:
        return self.tensors["scales"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix or stack that it stands for."""
        return (*self.values.shape[:-2], self.layout.num_rows, self.layout.num_columns)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def as_stack(self) -> "QuantizedWeight":
        """A matrix as a stack of one."""
        return QuantizedWeight(self.layout, {name: tensor.unsqueeze(0) for name, tensor in self.tensors.items()})

    def __getitem__(self, place: int) -> "QuantizedWeight":
        """One matrix of a stack."""
        return QuantizedWeight(self.layout, {name: tensor[place] for name, tensor in self.tensors.items()})


Weight: TypeAlias = torch.Tensor | QuantizedWeight


def weight_of(module: nn.Module, name: str) -> Weight:
    """A module's weight `name`, quantised if `declare_quantised` has made it so."""
    layout: WeightLayout | None = vars(module).get(layout_attribute(name))
    if layout is None:
        return getattr(module, name)
    return QuantizedWeight(layout, {role: getattr(module, name + end) for role, end in layout.attributes.items()})


def layout_attribute(name: str) -> str:
    """Where a module keeps the layout of its weight `name`."""
    return f"{name}_layout"
