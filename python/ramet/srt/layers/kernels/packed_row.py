"""Owns the product of one row with GPTQ's words, each of which holds columns of one output, and lies beside the next's.

That is a decode pass of one request, bound by reading the weights. Columns are split over programs, the last of which
adds up. The matrices of a stack, too, each with a row: experts of one or a few requests.
"""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.activation import activate
from ramet.srt.layers.kernels.choices import PACKED_ROW
from ramet.srt.layers.kernels.gemv import Experts
from ramet.srt.layers.kernels.packed_weights import PackedArguments
from ramet.srt.layers.kernels.prefetch import prefetch_words
from ramet.srt.layers.kernels.runtime import can_launch_early, is_interpreted, num_multiprocessors
from ramet.srt.layers.kernels.split_sums import MAX_TILES, counts_of

# (words beside each other, runs of rows, rows of words in a run, those of them that are loaded before they are used,
# warps, programs for a multiprocessor). A thread has words * runs / (32 * warps) words of a row, at most four.
Tile = tuple[int, int, int, int, int, int]
TILE: Tile = (128, 4, 8, 4, 4, 4)  # measured on an H200
INTERPRETED_TILE: Tile = (32, 8, 4, 2, 4, 1)
MOST_SPLITS = 32
SPLITS_AT_ONCE = tl.constexpr(16)  # that are added up
MOST_REGISTERS = 128  # of a thread; the compiler would take more, for loads that it moves ahead
# Numbers are used where they are in a word, as the bits of a float32: up to 24 bits are that many times 2^-149, with
# neither a shift nor a conversion. The product is brought back in two steps, since a float32 holds no 2^149.
X_UNIT = tl.constexpr(2.0**80)
OUT_UNIT = tl.constexpr(2.0**69)


@triton.jit
def _place_unit(PLACE: tl.constexpr, BITS: tl.constexpr):
    """What makes the numbers at all places of a word alike; see `_numbers_at`."""
    FIRST_BIT: tl.constexpr = PLACE * BITS if (PLACE + 1) * BITS <= 24 else PLACE * BITS - 8
    return tl.constexpr(1.0 / (1 << FIRST_BIT))


@triton.jit
def _numbers_at(words, PLACE: tl.constexpr, BITS: tl.constexpr):
    """The numbers at a place of words, in float32 times 2^-149 / _place_unit."""
    FIRST_BIT: tl.constexpr = PLACE * BITS if (PLACE + 1) * BITS <= 24 else PLACE * BITS - 8
    if FIRST_BIT < PLACE * BITS:
        words = words >> 8
    return (words & (((1 << BITS) - 1) << FIRST_BIT)).to(tl.float32, bitcast=True)


@triton.jit
def _load(ptrs, mask, IS_WHOLE: tl.constexpr):
    return tl.load(ptrs) if IS_WHOLE else tl.load(ptrs, mask=mask, other=0)


@triton.jit
def _load_words(
    ptrs, rows, num_word_rows, mask, stride, FIRST: tl.constexpr, NUM: tl.constexpr, IS_WHOLE: tl.constexpr
):
    """NUM rows of words [runs, words], the first of them FIRST rows after `rows`: all on their way at once.

    Each row is a load of its own: the rows of one tensor would be spread over threads, and brought together through
    shared memory.
    """
    words: tl.tuple = ()
    for step in tl.static_range(FIRST, FIRST + NUM):
        words += (_load(ptrs + step * stride, (rows + step < num_word_rows) & mask, IS_WHOLE),)
    return words


@triton.jit
def _load_x(x_ptr, columns, num_columns, IS_WHOLE: tl.constexpr):
    return _load(x_ptr + columns, columns < num_columns, IS_WHOLE).to(tl.float32)


@triton.jit
def _add_word(sums, word, x_ptr, x_sums, column, num_columns, BITS: tl.constexpr, IS_WHOLE: tl.constexpr):
    """Add a row of words to the sums of x times number, and its x to their sum."""
    for place in tl.static_range(32 // BITS):
        x = _load_x(x_ptr, column + place, num_columns, IS_WHOLE)
        x_sums += x
        sums += x * (X_UNIT * _place_unit(place, BITS)) * _numbers_at(word, place, BITS)
    return sums, x_sums


@triton.jit
def _sum_columns(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    outputs,
    first_output,
    first_row,
    num_outputs,
    num_columns,
    first_column,
    value_stride,
    scale_stride,
    zero_stride,
    num_iterations,
    GROUP_COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    ZERO_ONES: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    RUNS: tl.constexpr,
    STEPS: tl.constexpr,
    LOADS: tl.constexpr,
):
    """The outputs from `first_output` on for the program's columns."""
    NUM: tl.constexpr = 32 // BITS
    num_word_rows = num_columns // NUM
    mask = (outputs < num_outputs)[None, :]
    totals = tl.zeros([RUNS, outputs.shape[0]], tl.float32)
    rows = (first_row + tl.arange(0, RUNS) * STEPS)[:, None]
    for _ in range(num_iterations):
        ptrs = values_ptr + rows * value_stride + outputs[None, :]
        words = _load_words(ptrs, rows, num_word_rows, mask, value_stride, 0, LOADS, IS_WHOLE)
        groups = (first_column + rows * NUM) // GROUP_COLUMNS
        scale_ptrs = scales_ptr + groups * scale_stride + (first_output + outputs)[None, :]
        scales = _load(scale_ptrs, (rows < num_word_rows) & mask, IS_WHOLE)
        zero_ptrs = zeros_ptr + groups * zero_stride + (first_output // NUM + outputs // NUM)[None, :]
        zeros = _load(zero_ptrs, (rows < num_word_rows) & mask, IS_WHOLE) + ZERO_ONES
        zeros = zeros >> ((first_output + outputs) % NUM * BITS)[None, :]
        sums = tl.zeros([RUNS, outputs.shape[0]], tl.float32)
        x_sums = tl.zeros([RUNS, outputs.shape[0]], tl.float32)  # alike for all outputs, and so computed once
        for first in tl.static_range(0, STEPS, LOADS):
            next_words = words
            if first + LOADS < STEPS:
                next_words = _load_words(ptrs, rows, num_word_rows, mask, value_stride, first + LOADS, LOADS, IS_WHOLE)
            for step in tl.static_range(LOADS):
                column = (rows + first + step) * NUM
                sums, x_sums = _add_word(sums, words[step], x_ptr, x_sums, column, num_columns, BITS, IS_WHOLE)
            words = next_words
        # One `fma` keeps the compiler from computing the sum of x once more, for the threads that load zeros.
        totals += scales * tl.fma(_numbers_at(zeros, 0, BITS), x_sums * -X_UNIT, sums)
        rows += RUNS * STEPS
    return tl.sum(totals, axis=0) * OUT_UNIT


@triton.jit
def _add_partial(partial_ptrs, mask, stride, num_splits, AT_ONCE: tl.constexpr):
    total = tl.zeros([partial_ptrs.shape[0]], tl.float32)
    parts = tl.arange(0, AT_ONCE)
    for first in range(0, num_splits, AT_ONCE):
        ptrs = partial_ptrs[None, :] + ((first + parts) * stride)[:, None]
        there = (first + parts < num_splits)[:, None] & mask[None, :]
        total += tl.sum(tl.load(ptrs, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
    return total


@triton.jit
def _add_up(out, up, partial_ptr, counter, outputs, mask, num_outputs, part, num_splits, NUM_HALVES: tl.constexpr):
    """Leave a program's sums; for the last one of a tile, whether it is that one, and all sums added up in order."""
    size = num_outputs * NUM_HALVES
    tl.store(partial_ptr + part * size + outputs, out, mask=mask)
    if NUM_HALVES == 2:
        tl.store(partial_ptr + part * size + num_outputs + outputs, up, mask=mask)
    tl.debug_barrier()  # all of the program's sums are there before it counts
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == num_splits - 1
    if is_last:
        out = _add_partial(partial_ptr + outputs, mask, size, num_splits, SPLITS_AT_ONCE)
        if NUM_HALVES == 2:
            up = _add_partial(partial_ptr + num_outputs + outputs, mask, size, num_splits, SPLITS_AT_ONCE)
        tl.store(counter, 0)
    return is_last, out, up


@triton.jit(do_not_specialize=["num_iterations", "num_splits"])
def _packed_row_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    ids_ptr,
    out_ptr,
    partial_ptr,
    counts_ptr,
    num_outputs,
    num_columns,
    first_column,
    value_stride,
    scale_stride,
    zero_stride,
    num_iterations,
    num_splits,
    first_expert,
    num_experts,
    matrices_per_row,
    value_matrix_stride,
    scale_matrix_stride,
    zero_matrix_stride,
    HAS_EXPERTS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    ZERO_ONES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    RUNS: tl.constexpr,
    STEPS: tl.constexpr,
    LOADS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program makes the outputs of BLOCK_WORDS words, with ACTIVATION those of both halves, from some columns.

    It walks over RUNS runs of STEPS rows of words at a time, each of them in one group of columns.
    Each program leaves its sums, and the last one of a tile adds them up, always in the same order. `counts` tells how
    many of a tile have come, and is zero again after. Strides are those from row to row of words or groups.
    The first words go to the L2 cache before the wait for the kernel that makes x: nothing writes weights. Of a stack,
    they can't: the router must have said which.
    """
    NUM: tl.constexpr = 32 // BITS
    NUM_HALVES: tl.constexpr = 1 if ACTIVATION == "" else 2
    tile, part = tl.program_id(0), tl.program_id(1)
    outputs = tile * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    mask = outputs < num_outputs
    first_row = part * num_iterations * (RUNS * STEPS)
    is_here = True
    if HAS_EXPERTS:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        place = tl.program_id(2).to(tl.int64)
        expert = tl.load(ids_ptr + place).to(tl.int64) - first_expert
        is_here = (expert >= 0) & (expert < num_experts)
        expert = tl.where(is_here, expert, 0)
        values_ptr += expert * value_matrix_stride
        scales_ptr += expert * scale_matrix_stride
        zeros_ptr += expert * zero_matrix_stride
        x_ptr += place // matrices_per_row * num_columns
        out_ptr += place * num_outputs
        partial_ptr += place * num_splits * num_outputs * NUM_HALVES
        counts_ptr += place * tl.num_programs(0)
    if EARLY and not HAS_EXPERTS:
        prefetch_words(
            values_ptr, first_row, num_columns // NUM, tile * BLOCK_WORDS, num_outputs, value_stride, RUNS * STEPS,
            BLOCK_WORDS,
        )  # fmt: skip
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    out = _sum_columns(
        x_ptr, values_ptr, scales_ptr, zeros_ptr, outputs, 0, first_row, num_outputs, num_columns, first_column,
        value_stride, scale_stride, zero_stride, num_iterations, GROUP_COLUMNS, BITS, ZERO_ONES, IS_WHOLE, RUNS, STEPS,
        LOADS,
    )  # fmt: skip
    up = out
    if NUM_HALVES == 2:
        values_ptr += num_outputs
        up = _sum_columns(
            x_ptr, values_ptr, scales_ptr, zeros_ptr, outputs, num_outputs, first_row, num_outputs, num_columns,
            first_column, value_stride, scale_stride, zero_stride, num_iterations, GROUP_COLUMNS, BITS, ZERO_ONES,
            IS_WHOLE, RUNS, STEPS, LOADS,
        )  # fmt: skip
    is_last = True
    if IS_SPLIT:
        is_last, out, up = _add_up(
            out, up, partial_ptr, counts_ptr + tile, outputs, mask, num_outputs, part, num_splits, NUM_HALVES
        )
    if is_last:
        if HAS_BIAS:
            out += tl.load(bias_ptr + outputs, mask=mask, other=0.0).to(tl.float32)
        if NUM_HALVES == 2:
            if HAS_BIAS:
                up += tl.load(bias_ptr + num_outputs + outputs, mask=mask, other=0.0).to(tl.float32)
            out = activate(out, ACTIVATION) * up
        if HAS_EXPERTS:
            out = tl.where(is_here, out, 0.0)
        tl.store(out_ptr + outputs, out.to(out_ptr.dtype.element_ty), mask=mask)


def packed_row(
    x: torch.Tensor,
    packed: PackedArguments,
    bias: torch.Tensor | None = None,
    activation: str = "",
    experts: Experts | None = None,
) -> torch.Tensor:
    """x W^T + b, or with an activation's name act(first half) * second half of it.

    Args:
        x: contiguous [1, num_columns]; with experts also a row for each of them, or for each run of as many.
        packed: a stack of one matrix, with experts of theirs, of less than 2^31 numbers each, for which
            `takes_packed_row` holds.
        bias: not with experts.

    Returns:
        [1, num_outputs], or [1, num_outputs / 2]; with experts a row for each.
    """
    default = INTERPRETED_TILE if is_interpreted() else TILE
    shape = *packed.sizes[:2], packed.constants["BITS"], 1 if experts is None else len(experts.ids)
    words, runs, steps, loads, num_warps, num_programs = PACKED_ROW.pick(default, int(bool(activation)), *shape)
    tile = words, runs, steps, loads, num_warps, num_programs
    return launch_packed_row(x, packed, bias, activation, tile, experts)


def launch_packed_row(
    x: torch.Tensor,
    packed: PackedArguments,
    bias: torch.Tensor | None,
    activation: str,
    tile: Tile,
    experts: Experts | None = None,
) -> torch.Tensor:
    """The launch, with the tile that one program takes."""
    block_words, runs, steps, loads, num_warps, num_programs = tile
    num_matrix_outputs, num_columns, first_column, group_columns = packed.sizes
    constants = {name: packed.constants[name] for name in ("BITS", "ZERO_ONES")}
    num, number = 32 // constants["BITS"], 1 if experts is None else len(experts.ids)
    assert number % len(x) == 0 and (experts is None or (bias is None and experts.ids.is_contiguous()))
    num_outputs = num_matrix_outputs // 2 if activation else num_matrix_outputs
    while group_columns % (steps * num) or first_column % (steps * num):
        steps //= 2
    num_tiles = triton.cdiv(num_outputs, block_words)
    num_blocks = triton.cdiv(num_columns, runs * steps * num)
    all_tiles = num_tiles * number
    wanted = 1 if all_tiles > MAX_TILES else num_programs * num_multiprocessors(x.device) // all_tiles
    num_iterations = triton.cdiv(num_blocks, max(1, min(wanted, num_blocks, MOST_SPLITS)))
    # Rather somewhat fewer splits than some columns that are not there: those would mask all loads.
    whole = (number for number in range(num_iterations, 2 * num_iterations) if num_blocks % number == 0)
    num_iterations = next(whole, num_iterations)
    splits = triton.cdiv(num_blocks, num_iterations)
    out = torch.empty((number, num_outputs), dtype=x.dtype, device=x.device)
    partial = counts = out  # not touched
    if splits > 1:
        partial = torch.empty((number, splits, num_matrix_outputs), dtype=torch.float32, device=x.device)
        counts = counts_of(x.device)
    values, scales, _, zeros, *_ = packed.pointers
    early = can_launch_early(x.device)
    _packed_row_kernel[(num_tiles, splits, number)](
        x, values, scales, zeros, x if bias is None else bias, x if experts is None else experts.ids, out, partial,
        counts, num_outputs, num_columns, first_column, packed.strides[1], packed.strides[3], packed.strides[5],
        num_iterations, splits, 0 if experts is None else experts.first, len(values), number // len(x),
        *packed.group_strides[:3], HAS_EXPERTS=experts is not None, GROUP_COLUMNS=group_columns, **constants,
        HAS_BIAS=bias is not None, ACTIVATION=activation,
        IS_WHOLE=num_outputs % block_words == 0 and num_columns == splits * num_iterations * runs * steps * num,
        BLOCK_WORDS=block_words, RUNS=runs, STEPS=steps, LOADS=min(loads, steps), IS_SPLIT=splits > 1,
        EARLY=early, num_warps=num_warps, maxnreg=MOST_REGISTERS, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
