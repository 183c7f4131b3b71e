"""Owns products on CPUs with weights as they are stored, quantised or not: which ones kernels take, and their calls.

What a kernel is told of a weight follows from its format's grids alone. What does not fit is dequantised by others.
"""

import ctypes
from weakref import WeakKeyDictionary

import torch

from ramet.srt.configs.weight_format import WHOLE, WeightFormat
from ramet.srt.layers.cpu_kernels.library import call
from ramet.srt.layers.cpu_kernels.ops import DTYPES, use_cpu_kernels
from ramet.srt.layers.quantization.weight import QuantizedWeight, Weight, WeightLayout

# In the order of native/stored.h's Numbers, Places and ScaleNumbers.
NUMBERS = {("e4m3", 8): 0, ("e2m1", 4): 1, ("uint", 4): 2, ("uint", 8): 3, ("int", 8): 4}
PLAIN_NUMBERS = {torch.float32: 5, torch.bfloat16: 6, torch.float16: 7}
ALONG_COLUMNS, WORDS_OF_COLUMNS, WORDS_OF_ROWS = range(3)
SCALE_NUMBERS = {"float": (0, torch.float32), "exponent": (1, torch.uint8), "e4m3": (2, torch.float8_e4m3fn)}
WORD_BITS = 32
AWQ_WORD = 8  # rows of W

_Pointer, _Size, _Int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Matrix(ctypes.Structure):
    """native/stored.h's."""

    _fields_ = (
        *((name, _Pointer) for name in ("values", "scales", "zeros", "outer_scales")),
        *((name, _Pointer) for name in ("scale_rows", "column_groups", "column_parts")),
        *((f"{name}_bytes", _Size) for name in ("values", "scales", "zeros", "outer_scales", "column_groups")),
        *((name, _Size) for name in ("num_rows", "num_columns", "num_groups", "group_columns", "first_column")),
        *((name, _Int) for name in ("numbers", "places", "scale_numbers", "divides")),
        ("zeros_add", ctypes.c_uint32),
        ("are_transposed", _Int),
    )


_blanks: WeakKeyDictionary[WeightLayout, Matrix | None] = WeakKeyDictionary()


def takes_stored(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> bool:
    """Whether `stored_linear` multiplies rows x with a matrix, or those of a stack, and adds such a bias."""
    if not use_cpu_kernels(x) or x.dtype not in PLAIN_NUMBERS or weight.device.type != "cpu":
        return False
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        return False
    if isinstance(weight, torch.Tensor):
        return weight.dtype in PLAIN_NUMBERS and weight.is_contiguous() and weight.shape[-1] % _word(weight.dtype) == 0
    if not all(tensor.is_contiguous() for tensor in weight.tensors.values()):
        return False
    return _blank(weight) is not None


def stored_linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, ends: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + b, summed in float32 with what the numbers of W stand for, for what `takes_stored`.

    Args:
        x: [num_rows, input_size]; with `ends`, sorted by their matrix.
        weight: [output_size, input_size], or with `ends` a stack of those.
        ends: contiguous int32 [num_matrices], where the rows of each matrix of the stack end. What follows the last
            belongs to none, and its results hold anything.
    """
    assert ends is None or (ends.dtype == torch.int32 and len(ends) == weight.shape[0])
    x = x.contiguous()
    matrix = _plain(weight) if isinstance(weight, torch.Tensor) else _quantised(weight)
    y = torch.empty((len(x), weight.shape[-2]), dtype=x.dtype)
    call(
        "stored_linear", ctypes.addressof(matrix),
        1 if ends is None else len(ends), None if ends is None else ends.data_ptr(),
        DTYPES[x.dtype], x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), len(x),
    )  # fmt: skip
    return y


def _word(dtype: torch.dtype) -> int:
    return WORD_BITS // 8 // dtype.itemsize


def _blank(weight: QuantizedWeight) -> Matrix | None:
    """What is the same for all weights of a layout: all but where they lie. None if kernels don't take them."""
    layout = weight.layout
    try:
        return _blanks[layout]
    except KeyError:
        blank = _make_blank(weight) if _fits(weight) else None
        return _blanks.setdefault(layout, blank)


def _fits(weight: QuantizedWeight) -> bool:
    weight_format, layout = weight.format, weight.layout
    if (weight_format.numbers, weight_format.bits) not in NUMBERS:
        return False
    dtype = SCALE_NUMBERS[weight_format.scale_numbers][1]
    if weight.scales.dtype != dtype or not _has_known_scales(weight):
        return False
    index, places = layout.indices["scales"], _places(weight_format)
    num = 1 if places == WORDS_OF_ROWS else WORD_BITS // weight_format.bits  # columns that are scaled together
    if weight_format.column_groups is not None:
        return places == WORDS_OF_COLUMNS and layout.indices["column_groups"].rows is not None
    return index.columns == WHOLE or index.columns % num == index.first_column % num == 0


def _has_known_scales(weight: QuantizedWeight) -> bool:
    """Whether scales and zeros lie as the kernels read them beside such values."""
    weight_format = weight.format
    are_words = _places(weight_format) != ALONG_COLUMNS
    if weight_format.scales.is_transposed != are_words:
        return False
    if are_words and (weight_format.numbers != "uint" or weight_format.scale_numbers != "float"):
        return False
    if are_words and (weight_format.outer_scales is not None or weight.layout.indices["scales"].rows is not None):
        return False
    if weight_format.outer_scales is not None and weight_format.outer_scales.columns != WHOLE:
        return False
    zeros = weight_format.zeros
    return zeros is None or (zeros.packs_rows and zeros.is_transposed == are_words)


def _places(weight_format: WeightFormat) -> int:
    if weight_format.has_awq_order:
        return WORDS_OF_ROWS
    return WORDS_OF_COLUMNS if weight_format.values.is_transposed else ALONG_COLUMNS


def _plain(weight: torch.Tensor) -> Matrix:
    num_rows, num_columns = weight.shape[-2:]
    return Matrix(
        values=weight.data_ptr(), values_bytes=num_rows * num_columns * weight.element_size(), num_rows=num_rows,
        num_columns=num_columns, num_groups=1, group_columns=WHOLE, numbers=PLAIN_NUMBERS[weight.dtype],
    )  # fmt: skip


def _make_blank(weight: QuantizedWeight) -> Matrix:
    weight_format, layout = weight.format, weight.layout
    index = layout.indices["scales"]
    are_transposed = weight_format.scales.is_transposed
    matrix = Matrix(
        num_rows=layout.num_rows, num_columns=layout.num_columns,
        num_groups=weight.scales.shape[-2 if are_transposed else -1], group_columns=index.columns,
        first_column=index.first_column, numbers=NUMBERS[weight_format.numbers, weight_format.bits],
        places=_places(weight_format), scale_numbers=SCALE_NUMBERS[weight_format.scale_numbers][0],
        divides=weight_format.divides, zeros_add=weight_format.ones, are_transposed=are_transposed,
    )  # fmt: skip
    if index.rows is not None:
        matrix.scale_rows = index.rows.data_ptr()
    if weight_format.column_groups is not None:
        parts = layout.indices["column_groups"].rows
        assert parts is not None, "see _fits"
        matrix.column_parts = parts.data_ptr()
    return matrix


def _quantised(weight: QuantizedWeight) -> Matrix:
    blank = _blank(weight)
    assert blank is not None, "see takes_stored"
    matrix = Matrix.from_buffer_copy(blank)
    for role, tensor in weight.tensors.items():
        setattr(matrix, role, tensor.data_ptr())
        if tensor.dim() > 2:
            setattr(matrix, f"{role}_bytes", tensor.stride(0) * tensor.element_size())
    return matrix
