"""Owns what a quantised matrix is made of: grids, each a tensor whose elements cover so many rows and columns of it.

Pure data. A matrix [rows, columns] is its values, times scales, less zeros; which grids there are, where they lie in
a checkpoint and how their bits are read is all that tells one format from another.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

WHOLE = 1 << 30  # rows or columns: more than any matrix has
FP8 = "float8_e4m3fn"
BLOCK_SCALES = "_scale_inv"
BLOCKS = "_blocks"  # gpt-oss's name of the values of stacked experts
TRANSPOSED = (".qweight", ".scales", ".qzeros")  # ends of the names of AWQ's and GPTQ's tensors with rows last
OF_COLUMNS = (".g_idx", ".weight_g_idx")  # of those with a number for each column
FORMATS = ("fp8", "int4", "int8", "awq", "gptq", "mxfp4", "nvfp4")  # what manifests call them


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One tensor of a quantised matrix."""

    suffix: str  # of its name in checkpoints, in place of ".weight", which stacked experts have not
    attribute: str  # of its name in a layer, after the matrix' own
    dtype: str  # as a rank holds it
    rows: int = 1  # of the matrix that an element covers
    columns: int = 1
    is_packed: bool = False  # an element holds a number for each place that it covers, rather than one for all
    is_transposed: bool = False  # [columns, rows] in files and memory

    @property
    def packs_rows(self) -> bool:
        """Whether the numbers in an element are those of neighbouring rows."""
        return self.is_packed and self.rows > 1

    @property
    def packs_columns(self) -> bool:
        return self.is_packed and self.rows == 1

    @property
    def is_of_columns(self) -> bool:
        """Whether it is a vector in files, one element for each column of all rows."""
        return self.rows == WHOLE and self.columns != WHOLE


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """The grids of a quantised matrix, and what their numbers mean.

    With q the number that the bits of a value say, s its scale and z its zero, the weight is

    - numbers "e4m3", "e2m1": q * s, with an outer scale t: q * (s * t), or q * (s / t) if `divides`;
    - numbers "uint": (q - z) * s, z = 2 ** (bits - 1) where there are no zeros; "int": q * s.
    """

    name: str  # what manifests call it
    numbers: str  # e4m3, e2m1, uint (unsigned, packed) or int (two's complement)
    values: Grid
    scales: Grid  # float32, or with `scale_numbers` what those say
    scale_numbers: str = "float"  # float, exponent (uint8: powers of two) or e4m3
    outer_scales: Grid | None = None
    divides: bool = False
    zeros: Grid | None = None
    zeros_less_one: bool = False  # what is stored is the zero less one, in whole words (GPTQ's first format)
    column_groups: Grid | None = None  # the column of scales and zeros for each column, where they don't follow it
    bits: int = 8
    has_awq_order: bool = False  # of the numbers in a word
    multiplies_fp8: bool = False  # with activations in fp8, on a GPU that can

    def __iter__(self) -> Iterator[tuple[str, Grid]]:
        """All grids by the fields that hold them, values first."""
        for field in fields(self):
            grid = getattr(self, field.name)
            if isinstance(grid, Grid):
                yield field.name, grid

    @property
    def has_blocks(self) -> bool:
        """Whether it is fp8 with a grid of scales, be it one for each whole row."""
        return self.scales.attribute == BLOCK_SCALES

    @property
    def ones(self) -> int:
        """What is added to each word of zeros as a whole: one in each of its numbers, or nothing."""
        return {4: 0x11111111, 8: 0x01010101}[self.bits] if self.zeros_less_one else 0

    @property
    def sizes(self) -> dict[str, int]:
        """What other instances compare: the matrix' part that shares a scale, but for whole rows, and the bits."""
        sizes = {}
        if self.has_blocks:
            sizes = {"weight_block_rows": self.scales.rows, "weight_block_columns": self.scales.columns}
        elif self.numbers != "e4m3":
            sizes = {"weight_bits": self.bits, "weight_group_columns": self.scales.columns,
                     "weight_has_zeros": int(self.zeros is not None),
                     "weight_has_column_groups": int(self.column_groups is not None)}  # fmt: skip
        return sizes

    @property
    def summary(self) -> str:
        """What shares a scale, in words."""
        if self.scales.columns == WHOLE:
            return "rows"
        return f"blocks of {self.scales.rows} x {self.scales.columns}"


def fp8_rows() -> WeightFormat:
    """A scale for each row; a GPU may quantise activations, too, by row."""
    scales = Grid(suffix=".weight_scale", attribute="_scale", dtype="float32", columns=WHOLE)
    return WeightFormat(name="fp8", numbers="e4m3", values=_plain(FP8), scales=scales, multiplies_fp8=True)


def fp8_blocks(rows: int, columns: int, *, multiplies_fp8: bool = False) -> WeightFormat:
    """A scale for each block; (1, WHOLE) for rows that are multiplied with activations as they are.

    Where activations are in fp8, too, they have a scale for as many columns as a block has.
    """
    scales = Grid(suffix=".weight_scale_inv", attribute=BLOCK_SCALES, dtype="float32", rows=rows, columns=columns)
    return WeightFormat(name="fp8", numbers="e4m3", values=_plain(FP8), scales=scales, multiplies_fp8=multiplies_fp8)


def int8(columns: int) -> WeightFormat:
    """compressed-tensors' int-quantized: a scale for so many columns of a row."""
    return WeightFormat(name="int8", numbers="int", values=_plain("int8"), scales=_scales(columns))


def packed_int(bits: int, columns: int, *, has_zeros: bool, has_column_groups: bool) -> WeightFormat:
    """compressed-tensors' pack-quantized: words of columns, and zeros in words of rows."""
    num = 32 // bits
    zeros = Grid(suffix=".weight_zero_point", attribute="_zeros", dtype="int32", rows=num, columns=columns,
                 is_packed=True)  # fmt: skip
    return WeightFormat(
        name=f"int{bits}", numbers="uint", values=_words(".weight_packed", columns=num), scales=_scales(columns),
        zeros=zeros if has_zeros else None, bits=bits,
        column_groups=_column_groups(".weight_g_idx") if has_column_groups else None,
    )  # fmt: skip


def gptq(bits: int, columns: int, *, zeros_less_one: bool, has_column_groups: bool) -> WeightFormat:
    """AutoGPTQ's: all transposed, words of columns, and zeros in words of rows."""
    num = 32 // bits
    return WeightFormat(
        name="gptq", numbers="uint", values=_words(".qweight", columns=num, is_transposed=True),
        scales=_scales(columns, ".scales", is_transposed=True), zeros=_qzeros(num, columns),
        zeros_less_one=zeros_less_one, bits=bits,
        column_groups=_column_groups(".g_idx") if has_column_groups else None,
    )  # fmt: skip


def awq(columns: int) -> WeightFormat:
    """AutoAWQ's gemm: all transposed, everything in words of rows in an order of its own."""
    return WeightFormat(
        name="awq", numbers="uint", values=_words(".qweight", rows=8, is_transposed=True),
        scales=_scales(columns, ".scales", is_transposed=True), zeros=_qzeros(8, columns), bits=4, has_awq_order=True,
    )  # fmt: skip


def mxfp4(values: str = ".weight_packed", scales: str = ".weight_scale") -> WeightFormat:
    """OCP's: 32 columns share a power of two. By default as compressed-tensors stores it."""
    return WeightFormat(
        name="mxfp4", numbers="e2m1", values=_fp4(values), bits=4, scale_numbers="exponent",
        scales=Grid(suffix=scales, attribute="_scale", dtype="uint8", columns=32),
    )  # fmt: skip


def nvfp4(values: str, outer_scales: str, *, divides: bool) -> WeightFormat:
    """NVIDIA's: 16 columns share a scale in e4m3, and the matrix one in float32."""
    return WeightFormat(
        name="nvfp4", numbers="e2m1", values=_fp4(values), bits=4, scale_numbers="e4m3", divides=divides,
        scales=Grid(suffix=".weight_scale", attribute="_scale", dtype=FP8, columns=16),
        outer_scales=Grid(suffix=outer_scales, attribute="_scale_2", dtype="float32", columns=WHOLE),
    )  # fmt: skip


def _plain(dtype: str) -> Grid:
    return Grid(suffix=".weight", attribute="", dtype=dtype)


def _words(suffix: str, *, rows: int = 1, columns: int = 1, is_transposed: bool = False) -> Grid:
    return Grid(suffix=suffix, attribute="", dtype="int32", rows=rows, columns=columns, is_packed=True,
                is_transposed=is_transposed)  # fmt: skip


def _fp4(suffix: str) -> Grid:
    return Grid(suffix=suffix, attribute="", dtype="uint8", columns=2, is_packed=True)


def _scales(columns: int, suffix: str = ".weight_scale", *, is_transposed: bool = False) -> Grid:
    return Grid(suffix=suffix, attribute="_scale", dtype="float32", columns=columns, is_transposed=is_transposed)


def _qzeros(rows: int, columns: int) -> Grid:
    return Grid(suffix=".qzeros", attribute="_zeros", dtype="int32", rows=rows, columns=columns, is_packed=True,
                is_transposed=True)  # fmt: skip


def _column_groups(suffix: str) -> Grid:
    return Grid(suffix=suffix, attribute="_column_groups", dtype="int32", rows=WHOLE)
