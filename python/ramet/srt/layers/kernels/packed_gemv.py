"""Owns the product of one row with a matrix whose words hold columns: a decode pass of one request, bound by reading.

The matrices of a stack, too, each with a row: experts of one or a few requests.

That is compressed-tensors' integers, MXFP4 and NVFP4; packed_row.py and awq_rows.py have the formats whose words lie
one output after the other. Numbers are used where their bits are, as float32 values far below one: conversions of
integers would take longer than reading the weights.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.activation import activate
from ramet.srt.layers.kernels.choices import PACKED_GEMV
from ramet.srt.layers.kernels.gemv import Experts
from ramet.srt.layers.kernels.grouped_linear import e4m3_to_float
from ramet.srt.layers.kernels.packed_weights import PackedArguments
from ramet.srt.layers.kernels.runtime import can_launch_early, is_interpreted

UNIT = tl.constexpr(69)  # sums are kept in 2 ** -69: |x| may be up to 2 ** 47


class Tile(NamedTuple):
    """What one program multiplies at a time."""

    rows: int  # with an activation, as many of the other half, too
    words: int
    num_warps: int


TILE, GATED_TILE = Tile(8, 256, 4), Tile(8, 128, 4)  # measured on an H200
INTERPRETED_TILE = Tile(4, 8, 4)


@triton.jit
def _number(words, PLACE: tl.constexpr, NUMBERS: tl.constexpr, BITS: tl.constexpr):
    """One number of each word as float32, times 2 ** -_power.

    The lower 24 bits of a float32 without others are that many times 2 ** -149. A number of e2m1 has the places of
    sign, exponent and mantissa of a float32, whose exponent counts from 126 lower.
    """
    FIRST: tl.constexpr = PLACE * BITS
    if NUMBERS == "e2m1":
        sized = words << (22 - FIRST) if FIRST <= 22 else words >> (FIRST - 22)
        bits = (sized & 0x01C00000) | ((words << (28 - FIRST)) & -0x80000000)
    elif FIRST + BITS > 24:
        bits = (words >> 8) & (((1 << BITS) - 1) << (FIRST - 8))
    else:
        bits = words & (((1 << BITS) - 1) << FIRST)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _factor(PLACE: tl.constexpr, NUMBERS: tl.constexpr, BITS: tl.constexpr):
    """What makes the product of x and `_number` one in units of 2 ** -UNIT."""
    FIRST: tl.constexpr = PLACE * BITS
    LOW: tl.constexpr = FIRST - 8 if FIRST + BITS > 24 else FIRST
    POWER: tl.constexpr = 126 - UNIT if NUMBERS == "e2m1" else 149 - UNIT - LOW
    FACTOR: tl.constexpr = 2.0**POWER
    return FACTOR


@triton.jit
def _of_words(tile, BLOCK_ROWS: tl.constexpr, GROUPS: tl.constexpr, GROUP_WORDS: tl.constexpr):
    """What groups of words have, [rows, groups], for each of their words: [rows, words]."""
    tile = tl.broadcast_to(tile[:, :, None], (BLOCK_ROWS, GROUPS, GROUP_WORDS))
    return tl.reshape(tile, (BLOCK_ROWS, GROUPS * GROUP_WORDS))


@triton.jit
def _scaled(
    dot,
    x_sums,
    scales_ptr,
    zeros_ptr,
    rows,
    row_mask,
    first_word,
    num_groups,
    group_words,
    NUMBERS: tl.constexpr,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
):
    """Sums of words [rows, words] less those of zeros, times their scales."""
    NUM: tl.constexpr = 32 // BITS
    groups = tl.minimum(first_word // group_words + tl.arange(0, GROUPS), num_groups - 1)
    mask = row_mask[:, None] & (groups < num_groups)[None, :]
    scales = tl.load(scales_ptr + rows.to(tl.int64)[:, None] * num_groups + groups[None, :], mask=mask, other=0)
    if SCALES == "exponent":
        exponents = scales.to(tl.int32)
        scales = tl.where(exponents == 0, 1 << 22, exponents << 23).to(tl.float32, bitcast=True)
    elif SCALES == "e4m3":
        scales = e4m3_to_float(scales, tl.float32)
    if HAS_ZEROS:
        zeros = tl.load(zeros_ptr + (rows // NUM)[:, None] * num_groups + groups[None, :], mask=mask, other=0)
        zeros = ((zeros >> (rows % NUM * BITS)[:, None]) & ((1 << BITS) - 1)).to(tl.float32)
        dot -= _of_words(zeros, BLOCK_ROWS, GROUPS, GROUP_WORDS) * x_sums[None, :]
    elif NUMBERS != "e2m1":
        dot -= (1 << (BITS - 1)) * x_sums[None, :]
    return dot * _of_words(scales, BLOCK_ROWS, GROUPS, GROUP_WORDS)


@triton.jit
def _output(acc, rows, row_mask, outer_ptr, bias_ptr, OUTER: tl.constexpr, HAS_BIAS: tl.constexpr):
    """float32 [rows] of what was added up, [rows, words]."""
    out = tl.sum(acc, axis=1) * (2.0**UNIT)
    if OUTER != "":
        outer = tl.load(outer_ptr + rows, mask=row_mask, other=1.0)
        out = out * outer if OUTER == "times" else out / outer
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
    return out


@triton.jit
def _packed_gemv_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    outer_ptr,
    bias_ptr,
    ids_ptr,
    out_ptr,
    num_rows,
    num_words,
    num_groups,
    group_words,
    first_expert,
    num_experts,
    matrices_per_row,
    value_stride,
    scale_stride,
    zero_stride,
    outer_stride,
    HAS_EXPERTS: tl.constexpr,
    NUMBERS: tl.constexpr,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program makes BLOCK_ROWS outputs; with ACTIVATION, from those rows and the ones num_rows below them."""
    NUM: tl.constexpr = 32 // BITS
    GROUP_WORDS: tl.constexpr = BLOCK_WORDS // GROUPS
    FLIPPED: tl.constexpr = -0x7F7F7F80 if BITS == 8 else -0x77777778  # the signs of two's complement
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < num_rows
    up_rows = num_rows + rows
    words = tl.arange(0, BLOCK_WORDS)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if HAS_EXPERTS:
        assignment = tl.program_id(1).to(tl.int64)
        expert = tl.load(ids_ptr + assignment).to(tl.int64) - first_expert
        is_here = (expert >= 0) & (expert < num_experts)
        row_mask = rows < tl.where(is_here, num_rows, 0)
        expert = tl.where(is_here, expert, 0)
        values_ptr += expert * value_stride
        scales_ptr += expert * scale_stride
        zeros_ptr += expert * zero_stride
        outer_ptr += expert * outer_stride
        x_ptr += assignment // matrices_per_row * (num_words * NUM)
        out_ptr += assignment * num_rows
    value_ptrs = values_ptr + rows.to(tl.int64)[:, None] * num_words + words[None, :]
    up_offset = tl.cast(num_rows, tl.int64) * num_words
    acc = tl.zeros([BLOCK_ROWS, BLOCK_WORDS], tl.float32)
    up_acc = tl.zeros([BLOCK_ROWS, BLOCK_WORDS], tl.float32)
    for first in range(0, num_words, BLOCK_WORDS):
        mask = first + words < num_words
        values = tl.load(value_ptrs + first, mask=row_mask[:, None] & mask[None, :], other=0)
        if ACTIVATION != "":
            up_values = tl.load(value_ptrs + up_offset + first, mask=row_mask[:, None] & mask[None, :], other=0)
        if NUMBERS == "int":
            values = values ^ FLIPPED
            if ACTIVATION != "":
                up_values = up_values ^ FLIPPED
        dot = tl.zeros([BLOCK_ROWS, BLOCK_WORDS], tl.float32)
        up_dot = tl.zeros([BLOCK_ROWS, BLOCK_WORDS], tl.float32)
        x_sums = tl.zeros([BLOCK_WORDS], tl.float32)
        for place in tl.static_range(NUM):
            x = tl.load(x_ptr + (first + words) * NUM + place, mask=mask, other=0.0).to(tl.float32)
            x_sums += x
            x = (x * _factor(place, NUMBERS, BITS))[None, :]
            dot += _number(values, place, NUMBERS, BITS) * x
            if ACTIVATION != "":
                up_dot += _number(up_values, place, NUMBERS, BITS) * x
        x_sums *= 2.0**-UNIT
        acc += _scaled(
            dot, x_sums, scales_ptr, zeros_ptr, rows, row_mask, first, num_groups, group_words, NUMBERS, BITS, SCALES,
            HAS_ZEROS, BLOCK_ROWS, GROUPS, GROUP_WORDS,
        )  # fmt: skip
        if ACTIVATION != "":
            up_acc += _scaled(
                up_dot, x_sums, scales_ptr, zeros_ptr, up_rows, row_mask, first, num_groups, group_words, NUMBERS, BITS,
                SCALES, HAS_ZEROS, BLOCK_ROWS, GROUPS, GROUP_WORDS,
            )  # fmt: skip
    out = _output(acc, rows, row_mask, outer_ptr, bias_ptr, OUTER, HAS_BIAS)
    if ACTIVATION != "":
        up = _output(up_acc, up_rows, row_mask, outer_ptr, bias_ptr, OUTER, HAS_BIAS)
        out = activate(out, ACTIVATION) * up
    if HAS_EXPERTS:
        out = tl.where(row_mask, out, 0.0)  # of an expert that is not here
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=rows < num_rows)


def takes_group(group_columns: int, bits: int) -> bool:
    """Whether so many columns can share a scale: a power of two of whole words, or all that a row has."""
    words = group_columns * bits // 32
    return words >= 1 and words * 32 == group_columns * bits and words & (words - 1) == 0


def packed_gemv(
    x: torch.Tensor,
    packed: PackedArguments,
    bias: torch.Tensor | None,
    activation: str = "",
    tile: Tile | None = None,
    experts: Experts | None = None,
) -> torch.Tensor:
    """x W^T + b, or with an activation's name act(first half) * second half of it.

    Args:
        x: contiguous [1, n]; with experts also a row for each of them, or for each run of as many.
        packed: a stack of one matrix, with experts of theirs, whose words hold columns, the first of them the first of
            its group; see `takes_group`.
        bias: [number of outputs]; not with experts.
        tile: None takes what was measured, or else the best that is known.

    Returns:
        [1, number of outputs], or half of them; with experts a row for each.
    """
    values, scales, outer, zeros, *_ = packed.pointers
    all_rows, num_columns, _, group_columns = packed.sizes
    num_rows, constants = all_rows // 2 if activation else all_rows, packed.constants
    bits, number = constants["BITS"], 1 if experts is None else len(experts.ids)
    assert x.shape[1] == num_columns and number % len(x) == 0 and x.is_contiguous()
    assert experts is None or (bias is None and experts.ids.is_contiguous())
    out = torch.empty((number, num_rows), dtype=x.dtype, device=x.device)
    group_words, num_words = group_columns * bits // 32, num_columns * bits // 32
    if is_interpreted():
        tile = INTERPRETED_TILE
    elif tile is None:
        default, shape = GATED_TILE if activation else TILE, (num_rows, num_words, bits, group_words, number)
        tile = Tile(*PACKED_GEMV.pick(default, int(bool(activation)), *shape))
    early = can_launch_early(x.device)
    _packed_gemv_kernel[(triton.cdiv(num_rows, tile.rows), number)](
        x,
        values,
        scales,
        zeros,
        outer,
        x if bias is None else bias,
        x if experts is None else experts.ids,
        out,
        num_rows,
        num_words,
        scales.shape[2],
        group_words,
        0 if experts is None else experts.first,
        len(values),
        number // len(x),
        *packed.group_strides[:3],
        all_rows,
        HAS_EXPERTS=experts is not None,
        NUMBERS=constants["NUMBERS"],
        BITS=bits,
        SCALES=constants["SCALES"],
        OUTER=constants["OUTER"],
        HAS_ZEROS=constants["HAS_ZEROS"],
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        BLOCK_ROWS=tile.rows,
        BLOCK_WORDS=tile.words,
        GROUPS=max(1, tile.words // group_words),
        EARLY=early,
        num_warps=tile.num_warps,
        **({"launch_pdl": True} if early else {}),
    )
    return out
