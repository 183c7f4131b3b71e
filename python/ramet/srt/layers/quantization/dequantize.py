"""Owns what quantised weights stand for: their numbers times scales, less zeros, a block of rows at a time.

See WeightFormat for the formulas.
"""

from collections.abc import Callable

import torch

from ramet.srt.configs.weight_format import WHOLE, Grid
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.quantization.packed import fits_packed_kernel, packed_dequantize
from ramet.srt.layers.quantization.weight import QuantizedWeight

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # at a time: 1 MB and 64 MB in float32
ROW_MULTIPLE = 8  # words of rows hold so many at most


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """A matrix [num_rows, num_columns] in `dtype`, computed in float32 and rounded once."""
    if use_kernels(weight.values) and fits_packed_kernel(weight):
        return packed_dequantize(weight, dtype)
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
        self._apply(torch.Tensor.mul_, numbers, "scales", self._scales())
        return numbers

    def _numbers(self) -> torch.Tensor:
        """What the bits of values say, less zeros."""
        if self._format.numbers == "e2m1":
            return _e2m1(self._weight.values[self._start : self._stop])
        numbers = self._read("values", self._format.values).float()
        if self._format.zeros is not None:
            zeros = self._read("zeros", self._format.zeros).float()
            self._apply(torch.Tensor.sub_, numbers, "zeros", zeros)
        elif self._format.numbers == "uint":
            numbers -= 1 << (self._format.bits - 1)
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
            rows = slice(self._start // grid.rows, self._stop // grid.rows)
            words = tensor[:, rows].t() if grid.is_transposed else tensor[rows]
            if name == "zeros":
                words = words + self._format.ones
            return _unpack_rows(words.contiguous(), self._format.bits, self._format.has_awq_order)
        rows = slice(self._start, self._stop)
        if index.rows is not None:
            return tensor[index.rows[rows]]
        by_row = tensor[:, rows].t() if grid.is_transposed else tensor[rows]
        return _unpack_columns(by_row.contiguous(), self._format.bits) if grid.is_packed else by_row

    def _apply(self, operation: Callable[..., object], numbers: torch.Tensor, name: str, grid: torch.Tensor) -> None:
        """Run an operation in place on [num_rows, num_columns] with what a grid has for each number."""
        index, num_columns = self._weight.layout.indices[name], numbers.shape[1]
        if index.columns == WHOLE:
            operation(numbers, grid)
        elif self._format.column_groups is not None:
            operation(numbers, grid.gather(1, self._read("column_groups", self._format.column_groups).long()))
        elif index.first_column % index.columns == num_columns % index.columns == 0:
            # Much faster than to copy a scale for each number.
            operation(numbers.unflatten(1, (-1, index.columns)), grid.unsqueeze(2))
        else:
            operation(numbers, grid[:, index.columns_of(num_columns, numbers.device)])


def _unpack_columns(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [n, numbers] of words [n, words], the lowest bits first."""
    numbers = words.view(torch.uint8)
    return numbers if bits == 8 else torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(1)


def _unpack_rows(words: torch.Tensor, bits: int, has_awq_order: bool) -> torch.Tensor:
    """uint8 [numbers, n] of words [words, n], the lowest bits first: in AutoAWQ's order rows 0, 2, 4, 6, 1, 3, 5, 7."""
    num = 32 // bits
    numbers = torch.empty((len(words), num, words.shape[1]), dtype=torch.uint8, device=words.device)
    for row in range(num):
        place = row // 2 + row % 2 * 4 if has_awq_order else row
        numbers[:, row] = words >> (place * bits) & ((1 << bits) - 1)
    return numbers.flatten(0, 1)


def _e2m1(pairs: torch.Tensor) -> torch.Tensor:
    """float32 [n, 2 * m] of uint8 [n, m], each of which has a number in its lower four bits and one in its upper.

    By a table, which is made on the device: nothing comes from the host, so that a CUDA graph can hold it.
    """
    bits = torch.arange(256, dtype=torch.int32, device=pairs.device)
    twice = (_twice_e2m1(bits & 15) & 255) | (_twice_e2m1(bits >> 4) << 8)
    twice = twice.to(torch.int16).index_select(0, pairs.flatten().int())
    return twice.view(torch.int8).view(pairs.shape[0], -1).float().mul_(0.5)


def _twice_e2m1(bits: torch.Tensor) -> torch.Tensor:
    """Of 0 to 7: 0, 1, 2, 3, 4, 6, 8, 12; the same below zero from 8 on."""
    size = bits & 7
    twice = size + (size - 4).clamp(min=0) + 2 * (size == 7)
    return torch.where(bits > 7, -twice, twice)


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2 ** (e - 127) of bytes e, which are float8_e8m0fnu's, in float32; NaN for 255.

    Older versions of torch lack that type. A float32 has the same exponent, in its bits 23 to 30.
    """
    bits = exponents.to(torch.int32) << 23
    bits[exponents == 0] = 1 << 22  # 2 ** -127 is a subnormal number
    bits[exponents == 255] = 0x7FC00000
    return bits.view(torch.float32)
