"""Owns the product of a few rows with AWQ's words, each of which holds a column of eight outputs.

That is a decode pass of few requests, bound by reading the weights. The matrix units multiply all rows with the numbers
at one place of all words at once. Columns are split over programs, whose sums a second kernel adds up.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.activation import activate
from ramet.srt.layers.kernels.packed_weights import PackedArguments
from ramet.srt.layers.kernels.prefetch import prefetch_words
from ramet.srt.layers.kernels.runtime import can_launch_early, is_interpreted, next_power_of_2, num_multiprocessors

MAX_ROWS = 64  # beyond that dequantising is faster, measured on an H200
NUM = tl.constexpr(8)  # outputs of a word
MIN_COLUMNS = 16  # of one product
MAX_SPLITS = 32
FINISHED_OUTPUTS = 128  # by one program of the second kernel


class Tile(NamedTuple):
    """What one program multiplies at a time."""

    rows: int  # of x
    words: int  # beside each other
    columns: int
    num_warps: int
    num_programs: int  # for a multiprocessor
    num_registers: int


TILE = Tile(16, 32, 128, 4, 3, 168)  # measured on an H200
FLOAT32_TILE = TILE._replace(columns=32)  # which takes no more shared memory
INTERPRETED_TILE = Tile(16, 16, 16, 4, 1, 168)


DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


# Numbers of four bits at the eight places of two words each, as pairs of bfloat16: the bits of 128 with the number in
# the lowest ones. Of float16, 1024 has room for them.
def _unpacking(ones: str) -> str:
    lines = [".reg .b32 low, high, bits;", "prmt.b32 low, $8, $9, 0x5410;", "prmt.b32 high, $8, $9, 0x7632;"]
    for place in range(8):
        source = "low" if place < 4 else "high"
        if place % 4:
            lines.append(f"shr.b32 bits, {source}, {place % 4 * 4};")
            source = "bits"
        lines.append(f"lop3.b32 ${place}, {source}, 0x000F000F, {ones}, 0xEA;")
    return "{" + " ".join(lines) + "}"


UNPACK_BFLOAT16 = tl.constexpr(_unpacking("0x43004300"))
UNPACK_FLOAT16 = tl.constexpr(_unpacking("0x64006400"))


@triton.jit
def _numbers(words, DTYPE: tl.constexpr):
    """The numbers at each place of words, plus `_excess`: a tuple of eight tensors like them."""
    numbers: tl.tuple = ()
    if tl.bfloat16 == DTYPE:
        numbers = tl.inline_asm_elementwise(
            UNPACK_BFLOAT16, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2
        )
    elif tl.float16 == DTYPE:
        numbers = tl.inline_asm_elementwise(
            UNPACK_FLOAT16, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words], dtype=(tl.float16,) * 8, is_pure=True, pack=2
        )
    else:
        for place in tl.static_range(NUM):
            numbers += (((words >> (place * 4)) & 15).to(DTYPE),)
    return numbers


@triton.jit
def _excess(DTYPE: tl.constexpr):
    return tl.constexpr(128.0 if tl.bfloat16 == DTYPE else 1024.0 if tl.float16 == DTYPE else 0.0)


@triton.jit
def _output_at(PLACE: tl.constexpr):
    """Which of a word's outputs is at a place: 0, 2, 4, 6, 1, 3, 5, 7."""
    return tl.constexpr(PLACE * 2 % 8 + PLACE // 4)


@triton.jit
def _add_group(totals, numbers, x, scales, zeros, DTYPE: tl.constexpr):
    """Add to the sums of places the product of x with numbers of columns that share scales."""
    # In the layout of the products, which a sum over columns would have to be brought into.
    x_sums = tl.dot(
        x, tl.full([x.shape[1], totals[0].shape[1]], 1.0, DTYPE), out_dtype=tl.float32, input_precision="ieee"
    )
    new: tl.tuple = ()
    for place in tl.static_range(NUM):
        zero = ((zeros >> (place * 4)) & 15).to(tl.float32) + _excess(DTYPE)
        dot = tl.dot(x, numbers[place], out_dtype=tl.float32, input_precision="ieee")
        new += (totals[place] + scales[place][None, :] * (dot - x_sums * zero[None, :]),)
    return new


@triton.jit
def _load_scales(scales_ptr, words, num_words):
    """Those of the outputs at each place of words, as they are stored."""
    scales: tl.tuple = ()
    for place in tl.static_range(NUM):
        ptrs = scales_ptr + words * NUM + _output_at(place)
        scales += (tl.load(ptrs, mask=words < num_words, other=0.0).to(tl.float32),)
    return scales


@triton.jit(do_not_specialize=["num_rows", "num_steps"])
def _awq_rows_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    partial_ptr,
    num_rows,
    num_outputs,
    num_columns,
    offset,
    group_columns,
    x_stride,
    value_stride,
    scale_stride,
    zero_stride,
    num_steps,
    GROUPS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program sums num_steps times COLUMNS columns of WORDS words, into partial[split, row, output].

    Columns have scales in groups of `group_columns`, the first of which lacks `offset` columns; a step has columns of
    GROUPS of them. The words of a step go to the L2 cache one step before, the first ones before the wait for the
    kernel that makes x: nothing writes weights.
    """
    SIZE: tl.constexpr = NUM * WORDS
    tile, split = tl.program_id(1), tl.program_id(2)
    num_words = num_outputs // NUM
    first_column = split * num_steps * COLUMNS
    words = tile * WORDS + tl.arange(0, WORDS)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if EARLY:
        prefetch_words(values_ptr, first_column, num_columns, tile * WORDS, num_words, value_stride, COLUMNS, WORDS)
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    totals: tl.tuple = ()
    for _ in tl.static_range(NUM):
        totals += (tl.zeros([BLOCK_ROWS, WORDS], tl.float32),)
    for step in range(num_steps):
        start = first_column + step * COLUMNS
        columns = start + tl.arange(0, COLUMNS)
        ptrs = values_ptr + columns[:, None] * value_stride + words[None, :]
        x_ptrs = x_ptr + rows[:, None] * x_stride + columns[None, :]
        # There may be no such group: x is zero behind the last column, and so scales may be any that are.
        last_group = (num_columns - 1 + offset) // group_columns
        group = tl.minimum((start + offset) // group_columns, last_group)
        # What is soon there is asked for first: the words are brought into another layout as soon as they have come.
        scales = _load_scales(scales_ptr + group * scale_stride, words, num_words)
        zeros = tl.load(zeros_ptr + group * zero_stride + words, mask=words < num_words, other=0)
        if IS_WHOLE:
            x = tl.load(x_ptrs, mask=(rows < num_rows)[:, None], other=0.0)
            values = tl.load(ptrs)
        else:
            there = columns < num_columns
            x = tl.load(x_ptrs, mask=(rows < num_rows)[:, None] & there[None, :], other=0.0)
            values = tl.load(ptrs, mask=there[:, None] & (words < num_words)[None, :], other=0)
        if EARLY:
            next_start = tl.where(step + 1 < num_steps, start + COLUMNS, start)
            prefetch_words(values_ptr, next_start, num_columns, tile * WORDS, num_words, value_stride, COLUMNS, WORDS)
        numbers = _numbers(values, DTYPE)
        if GROUPS == 1:
            totals = _add_group(totals, numbers, x.to(DTYPE), scales, zeros, DTYPE)
        else:
            for number in tl.static_range(GROUPS):
                there = (columns + offset) // group_columns == group + number
                part_group = tl.minimum(group + number, last_group)
                scales = _load_scales(scales_ptr + part_group * scale_stride, words, num_words)
                zeros = tl.load(zeros_ptr + part_group * zero_stride + words, mask=words < num_words, other=0)
                totals = _add_group(totals, numbers, tl.where(there[None, :], x, 0.0).to(DTYPE), scales, zeros, DTYPE)
    even = tl.join(tl.join(totals[0], totals[2]), tl.join(totals[1], totals[3]))
    odd = tl.join(tl.join(totals[4], totals[6]), tl.join(totals[5], totals[7]))
    out = tl.reshape(tl.join(even, odd), (BLOCK_ROWS, SIZE))
    outputs = tile * SIZE + tl.arange(0, SIZE)
    places = (split * num_rows + rows)[:, None] * num_outputs + outputs[None, :]
    tl.store(partial_ptr + places, out, mask=(rows < num_rows)[:, None] & (outputs < num_outputs)[None, :])


@triton.jit
def _sum_of_splits(partial_ptrs, mask, split_stride, num_splits, AT_ONCE: tl.constexpr):
    splits = tl.arange(0, AT_ONCE)
    there = (splits < num_splits)[:, None] & mask[None, :]
    return tl.sum(tl.load(partial_ptrs[None, :] + splits[:, None] * split_stride, mask=there, other=0.0), axis=0)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _add_splits_kernel(
    partial_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_outputs,
    num_splits,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program makes BLOCK outputs of one row; with ACTIVATION, from those and the ones num_outputs behind them."""
    row = tl.program_id(1)
    outputs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = outputs < num_outputs
    width = num_outputs if ACTIVATION == "" else 2 * num_outputs
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    ptrs = partial_ptr + row * width + outputs
    out = _sum_of_splits(ptrs, mask, num_rows * width, num_splits, AT_ONCE)
    if HAS_BIAS:
        out += tl.load(bias_ptr + outputs, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        up = _sum_of_splits(ptrs + num_outputs, mask, num_rows * width, num_splits, AT_ONCE)
        if HAS_BIAS:
            up += tl.load(bias_ptr + num_outputs + outputs, mask=mask, other=0.0).to(tl.float32)
        out = activate(out, ACTIVATION) * up
    tl.store(out_ptr + row * num_outputs + outputs, out.to(out_ptr.dtype.element_ty), mask=mask)


def awq_rows(
    x: torch.Tensor, packed: PackedArguments, bias: torch.Tensor | None = None, activation: str = ""
) -> torch.Tensor:
    """x W^T + b, or with an activation's name act(first half) * second half of it.

    Args:
        x: [num_rows, num_columns], whose rows may be apart; bfloat16, float16 or float32.
        packed: a stack of one matrix, of less than 2^31 numbers, for which `takes_packed_row` holds.

    Returns:
        [num_rows, num_outputs], or [num_rows, num_outputs / 2].
    """
    tile = TILE if x.dtype != torch.float32 else FLOAT32_TILE
    return launch_awq_rows(x, packed, bias, activation, INTERPRETED_TILE if is_interpreted() else tile)


def launch_awq_rows(
    x: torch.Tensor, packed: PackedArguments, bias: torch.Tensor | None, activation: str, tile: Tile
) -> torch.Tensor:
    """The launches, with the tile that one program takes."""
    num_outputs, num_columns, offset, group_columns = packed.sizes
    num_rows, group_columns, columns = x.shape[0], min(group_columns, offset + num_columns), tile.columns
    is_one_group = group_columns == offset + num_columns
    while columns > MIN_COLUMNS and not is_one_group and (group_columns % columns or offset % columns):
        columns //= 2
    is_even = is_one_group or not (group_columns % columns or offset % columns)
    size, num_steps = tile.words * NUM.value, triton.cdiv(num_columns, columns)
    num_tiles, num_row_blocks = triton.cdiv(num_outputs, size), triton.cdiv(num_rows, tile.rows)
    wanted = tile.num_programs * num_multiprocessors(x.device) // (num_tiles * num_row_blocks)
    each = triton.cdiv(num_steps, max(1, min(wanted, num_steps, MAX_SPLITS)))
    # Rather somewhat fewer splits than some columns that are not there: those would mask all loads.
    each = next((number for number in range(each, 2 * each) if num_steps % number == 0), each)
    splits = triton.cdiv(num_steps, each)
    partial = torch.empty((splits, num_rows, num_outputs), dtype=torch.float32, device=x.device)
    values, scales, _, zeros, *_ = packed.pointers
    early = can_launch_early(x.device)
    launch = {"EARLY": early, **({"launch_pdl": True} if early else {})}
    _awq_rows_kernel[(num_row_blocks, num_tiles, splits)](
        x, values, scales, zeros, partial, num_rows, num_outputs, num_columns, offset, group_columns, x.stride(0),
        packed.strides[1], packed.strides[3], packed.strides[5], each,
        GROUPS=1 if is_even else triton.cdiv(columns - 1, group_columns) + 1,
        IS_WHOLE=num_outputs % size == 0 and num_columns == splits * each * columns,
        DTYPE=tl.float32 if is_interpreted() else DTYPES[x.dtype],
        BLOCK_ROWS=tile.rows, WORDS=tile.words, COLUMNS=columns, num_warps=tile.num_warps, num_stages=1,
        maxnreg=tile.num_registers, **launch,
    )  # fmt: skip
    out = torch.empty((num_rows, num_outputs // 2 if activation else num_outputs), dtype=x.dtype, device=x.device)
    _add_splits_kernel[(triton.cdiv(out.shape[1], FINISHED_OUTPUTS), num_rows)](
        partial, x if bias is None else bias, out, num_rows, out.shape[1], splits, HAS_BIAS=bias is not None,
        ACTIVATION=activation, BLOCK=FINISHED_OUTPUTS, AT_ONCE=next_power_of_2(splits), num_warps=4, **launch,
    )  # fmt: skip
    return out
