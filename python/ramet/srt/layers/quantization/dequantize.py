"""Owns what quantised weights stand for: their numbers times scales, less zeros, a block of rows at a time.

See WeightFormat for the formulas.
"""

import torch

from ramet.srt.configs.weight_format import WHOLE, Grid
from ramet.srt.layers.quantization.weight import QuantizedWeight

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # at a time: 1 MB and 64 MB in float32
ROW_MULTIPLE = 8  # words of rows hold so many at most
ONES = {4: 0x11111111, 8: 0x01010101}  # one in each number of a word


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """A matrix [num_rows, num_columns] in `dtype`, computed in float32 and rounded once."""
    num_rows, num_columns = weight.shape
    result = torch.empty((num_rows, num_columns), dtype=dtype, device=weight.device)
    step = BLOCK_ELEMENTS[weight.device.type] // max(1, num_columns)
    step = max(ROW_MULTIPLE, step // ROW_MULTIPLE * ROW_MULTIPLE)
    for start in range(0, num_rows, step):
        result[start : start + step] = _Rows(weight, start, min(start + step, num_rows)).dequantize()
    return result


class _Rows:
    """Some rows of a quantised matrix."""

    def __init__(self, weight: QuantizedWeight, start: int, stop: int):
        self._weight = weight
        self._format = weight.format
        self._start, self._stop = start, stop

    def dequantize(self) -> torch.Tensor:
        """float32 [num_rows, num_columns]."""
        numbers = self._numbers()
        return numbers.mul_(self._spread("scales", self._scales()))

    def _numbers(self) -> torch.Tensor:
        """What the bits of values say, less zeros."""
        grid = self._format.values
        if self._format.numbers == "e2m1":
            return _e2m1(self._read("values", grid))
        numbers = self._read("values", grid).float()
        if self._format.numbers == "uint":
            if self._format.zeros is None:
                numbers -= 1 << (self._format.bits - 1)
            else:
                numbers -= self._spread("zeros", self._read("zeros", self._format.zeros).float())
        return numbers

    def _scales(self) -> torch.Tensor:
        scales = self._read("scales", self._format.scales)
        scales = powers_of_two(scales) if self._format.scale_numbers == "exponent" else scales.float()
        if self._format.outer_scales is None:
            return scales
        outer = self._read("outer_scales", self._format.outer_scales)
        return scales / outer if self._format.divides else scales * outer

    def _read(self, name: str, grid: Grid) -> torch.Tensor:
        """A grid's numbers for these rows, unpacked: [num_rows, columns of the grid, unpacked]."""
        tensor, index = self._weight.tensors[name], self._weight.layout.indices[name]
        if grid.packs_rows:
            words = slice(self._start // grid.rows, self._stop // grid.rows)
            by_column = tensor[:, words] if grid.is_transposed else tensor[words].t()
            return self._unpack(by_column, name).t()
        rows = slice(self._start, self._stop)
        if index.rows is not None:
            return tensor[index.rows[rows]]
        by_row = tensor[:, rows].t() if grid.is_transposed else tensor[rows]
        return self._unpack(by_row, name) if grid.is_packed else by_row

    def _unpack(self, words: torch.Tensor, name: str) -> torch.Tensor:
        """uint8 [n, numbers] of words [n, words], the lowest bits first."""
        bits = self._format.bits
        if name == "zeros" and self._format.zeros_less_one:
            words = words + ONES[bits]
        numbers = words.contiguous().view(torch.uint8)
        if bits == 4:
            numbers = torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(1)
        if self._format.has_awq_order:
            # From the lowest bits on, a word has the rows 0, 2, 4, 6, 1, 3, 5, 7.
            numbers = numbers.unflatten(1, (-1, 2, 4)).transpose(2, 3).flatten(1)
        return numbers

    def _spread(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        """A grid's numbers for each column of the matrix; [num_rows, 1] where a row has one for all of them."""
        index = self._weight.layout.indices[name]
        if index.columns == WHOLE:
            return numbers
        if self._format.column_groups is None:
            return numbers[:, index.columns_of(self._weight.layout.num_columns, numbers.device)]
        return numbers.gather(1, self._read("column_groups", self._format.column_groups).long())


def _e2m1(bits: torch.Tensor) -> torch.Tensor:
    """What four bits say, in float32: their exponent and mantissa in a float16's places, and the bias between the two.

    Nothing comes from the host, so that a CUDA graph can hold it.
    """
    bits = bits.short()
    return ((bits & 7) << 9 | (bits & 8) << 12).view(torch.float16).float() * 16384.0


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2 ** (e - 127) of bytes e, which are float8_e8m0fnu's, in float32; NaN for 255.

    Older versions of torch lack that type. A float32 has the same exponent, in its bits 23 to 30.
    """
    bits = exponents.to(torch.int32) << 23
    bits[exponents == 0] = 1 << 22  # 2 ** -127 is a subnormal number
    bits[exponents == 255] = 0x7FC00000
    return bits.view(torch.float32)
