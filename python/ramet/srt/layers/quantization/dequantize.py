"""Owns what quantised weights stand for: their numbers times scales, less zeros, a block of rows at a time.

See WeightFormat for the formulas.
"""

import torch

from ramet.srt.configs.weight_format import WHOLE
from ramet.srt.layers.quantization.weight import QuantizedWeight

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # at a time: 1 MB and 64 MB in float32
ROW_MULTIPLE = 8  # words of rows hold so many at most


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """A matrix [num_rows, num_columns] in `dtype`, computed in float32 and rounded once."""
    num_rows, num_columns = weight.shape
    result = torch.empty((num_rows, num_columns), dtype=dtype, device=weight.device)
    columns = {
        name: index.columns_of(num_columns, weight.device)
        for name, index in weight.layout.indices.items()
        if name != "values" and index.columns != WHOLE
    }
    step = BLOCK_ELEMENTS[weight.device.type] // max(1, num_columns)
    step = max(ROW_MULTIPLE, step // ROW_MULTIPLE * ROW_MULTIPLE)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        result[rows] = _numbers(weight, rows).mul_(_spread(weight, "scales", rows, columns))
    return result


def _numbers(weight: QuantizedWeight, rows: slice) -> torch.Tensor:
    """float32 [num_rows of the slice, num_columns]: what the bits of the values say."""
    return weight.values[rows].float()


def _spread(weight: QuantizedWeight, name: str, rows: slice, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """A grid's numbers for the rows of a slice: float32 [num_rows, num_columns], or [num_rows, 1] for whole rows."""
    index, tensor = weight.layout.indices[name], weight.tensors[name]
    by_row = tensor[rows] if index.rows is None else tensor[index.rows[rows]]
    return by_row[:, columns[name]] if name in columns else by_row
