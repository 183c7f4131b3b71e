"""Owns the product of one row with integers in words that lie one output after the other (AWQ, GPTQ).

That is a decode pass of one request, bound by reading the weights. Columns are split over programs, the last of which
adds up.
"""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.activation import activate
from ramet.srt.layers.kernels.packed_weights import PackedArguments
from ramet.srt.layers.kernels.runtime import can_launch_early, is_interpreted, num_multiprocessors
from ramet.srt.layers.kernels.split_sums import MAX_TILES, counts_of

# (words beside each other, runs of rows, rows of words in a run, those of them that are loaded before they are used,
# warps, programs for a multiprocessor). A thread has words * runs / (32 * warps) words of a row, at most four.
Tile = tuple[int, int, int, int, int, int]
TILES: dict[bool, Tile] = {
    True: (64, 4, 16, 8, 4, 4),
    False: (128, 4, 8, 4, 4, 4),
}  # by whether words hold outputs; measured on an H200
INTERPRETED_TILES: dict[bool, Tile] = {True: (4, 8, 4, 2, 4, 1), False: (32, 8, 4, 2, 4, 1)}
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
def _add_word(
    sums, word, x_ptr, x_sums, column, num_columns, BITS: tl.constexpr, PACKS_ROWS: tl.constexpr, IS_WHOLE: tl.constexpr
):
    """Add a row of words to the sums of x times number, and its x to their sum.

    There is a sum for each place of AWQ's words; one in all for GPTQ's, in each of which are columns of one output.
    """
    new: tl.tuple = ()
    total = sums[0]
    for place in tl.static_range(32 // BITS):
        if place == 0 or not PACKS_ROWS:
            x = _load_x(x_ptr, column + place, num_columns, IS_WHOLE)
            x_sums += x
        if PACKS_ROWS:
            new += (sums[place] + x * X_UNIT * _numbers_at(word, place, BITS),)
        else:
            total += x * (X_UNIT * _place_unit(place, BITS)) * _numbers_at(word, place, BITS)
    if not PACKS_ROWS:
        new = (total,)
    return new, x_sums


@triton.jit
def _outputs_of(sums, zeros, less_x, BITS: tl.constexpr, PACKS_ROWS: tl.constexpr):
    """The sums for places, less those with zeros, as [runs, outputs].

    AWQ has the outputs 0, 2, 4, 6, 1, 3, 5, 7 in a word. That it is one `fma` keeps the compiler from computing the sum
    of x once more, for the threads that load GPTQ's zeros.
    """
    outs: tl.tuple = ()
    for place in tl.static_range(32 // BITS if PACKS_ROWS else 1):
        out = tl.fma(_numbers_at(zeros, place, BITS), less_x, sums[place])
        outs += (out * _place_unit(place, BITS),)
    out = outs[0]
    if PACKS_ROWS:
        even = tl.join(tl.join(outs[0], outs[2]), tl.join(outs[1], outs[3]))
        odd = tl.join(tl.join(outs[4], outs[6]), tl.join(outs[5], outs[7]))
        out = tl.reshape(tl.join(even, odd), (zeros.shape[0], zeros.shape[1] * 8))
    return out


@triton.jit
def _sum_columns(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    word_outputs,
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
    PACKS_ROWS: tl.constexpr,
    ZERO_ONES: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    RUNS: tl.constexpr,
    STEPS: tl.constexpr,
    LOADS: tl.constexpr,
):
    """The outputs from `first_output` on for the program's columns."""
    NUM: tl.constexpr = 32 // BITS
    PLACES: tl.constexpr = NUM if PACKS_ROWS else 1
    ROW_COLUMNS: tl.constexpr = NUM // PLACES
    num_word_rows = num_columns // ROW_COLUMNS
    words_mask = (word_outputs < num_outputs // PLACES)[None, :]
    mask = (outputs < num_outputs)[None, :]
    totals = tl.zeros([RUNS, outputs.shape[0]], tl.float32)
    rows = (first_row + tl.arange(0, RUNS) * STEPS)[:, None]
    for _ in range(num_iterations):
        ptrs = values_ptr + rows * value_stride + word_outputs[None, :]
        words = _load_words(ptrs, rows, num_word_rows, words_mask, value_stride, 0, LOADS, IS_WHOLE)
        groups = (first_column + rows * ROW_COLUMNS) // GROUP_COLUMNS
        scale_ptrs = scales_ptr + groups * scale_stride + (first_output + outputs)[None, :]
        scales = _load(scale_ptrs, (rows < num_word_rows) & mask, IS_WHOLE)
        zero_words = first_output // NUM + (word_outputs if PACKS_ROWS else word_outputs // NUM)
        zero_ptrs = zeros_ptr + groups * zero_stride + zero_words[None, :]
        zeros = _load(zero_ptrs, (rows < num_word_rows) & words_mask, IS_WHOLE) + ZERO_ONES
        if not PACKS_ROWS:
            zeros = zeros >> ((first_output + word_outputs) % NUM * BITS)[None, :]
        sums: tl.tuple = ()
        for _ in tl.static_range(PLACES):
            sums += (tl.zeros([RUNS, word_outputs.shape[0]], tl.float32),)
        x_sums = tl.zeros([RUNS, word_outputs.shape[0]], tl.float32)  # alike for all words, and so computed once
        for first in tl.static_range(0, STEPS, LOADS):
            next_words = words
            if first + LOADS < STEPS:
                next_words = _load_words(
                    ptrs, rows, num_word_rows, words_mask, value_stride, first + LOADS, LOADS, IS_WHOLE
                )
            for step in tl.static_range(LOADS):
                column = (rows + first + step) * ROW_COLUMNS
                sums, x_sums = _add_word(
                    sums, words[step], x_ptr, x_sums, column, num_columns, BITS, PACKS_ROWS, IS_WHOLE
                )
            words = next_words
        totals += scales * _outputs_of(sums, zeros, x_sums * -X_UNIT, BITS, PACKS_ROWS)
        rows += RUNS * STEPS
    return tl.sum(totals, axis=0) * OUT_UNIT


@triton.jit
def _prefetch_words(
    values_ptr, first_row, first_word, num_word_rows, num_words, stride, ROWS: tl.constexpr, WORDS: tl.constexpr
):
    """Bring words into the L2 cache, a sector of 32 bytes with each instruction."""
    rows = tl.minimum(first_row + tl.arange(0, ROWS), num_word_rows - 1)
    words = tl.minimum(first_word + tl.arange(0, WORDS // 8) * 8, num_words - 1)
    ptrs = values_ptr + rows[:, None] * stride + words[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _add_partial(partial_ptrs, mask, stride, num_splits, AT_ONCE: tl.constexpr):
    total = tl.zeros([partial_ptrs.shape[0]], tl.float32)
    parts = tl.arange(0, AT_ONCE)
    for first in range(0, num_splits, AT_ONCE):
        ptrs = partial_ptrs[None, :] + ((first + parts) * stride)[:, None]
        there = (first + parts < num_splits)[:, None] & mask[None, :]
        total += tl.sum(tl.load(ptrs, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
    return total


@triton.jit(do_not_specialize=["num_iterations", "num_splits"])
def _packed_row_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
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
    GROUP_COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    PACKS_ROWS: tl.constexpr,
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
    The first words go to the L2 cache before the wait for the kernel that makes x: nothing writes weights.
    """
    NUM: tl.constexpr = 32 // BITS
    WORD_OUTPUTS: tl.constexpr = NUM if PACKS_ROWS else 1
    NUM_HALVES: tl.constexpr = 1 if ACTIVATION == "" else 2
    tile, part = tl.program_id(0), tl.program_id(1)
    word_outputs = tile * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    outputs = tile * (BLOCK_WORDS * WORD_OUTPUTS) + tl.arange(0, BLOCK_WORDS * WORD_OUTPUTS)
    mask = outputs < num_outputs
    first_row = part * num_iterations * (RUNS * STEPS)
    if EARLY:
        _prefetch_words(
            values_ptr, first_row, tile * BLOCK_WORDS, num_columns * WORD_OUTPUTS // NUM, num_outputs // WORD_OUTPUTS,
            value_stride, RUNS * STEPS, BLOCK_WORDS,
        )  # fmt: skip
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    out = _sum_columns(
        x_ptr, values_ptr, scales_ptr, zeros_ptr, word_outputs, outputs, 0, first_row, num_outputs, num_columns,
        first_column, value_stride, scale_stride, zero_stride, num_iterations, GROUP_COLUMNS, BITS, PACKS_ROWS,
        ZERO_ONES, IS_WHOLE, RUNS, STEPS, LOADS,
    )  # fmt: skip
    up = out
    if NUM_HALVES == 2:
        values_ptr += num_outputs // WORD_OUTPUTS
        up = _sum_columns(
            x_ptr, values_ptr, scales_ptr, zeros_ptr, word_outputs, outputs, num_outputs, first_row, num_outputs,
            num_columns, first_column, value_stride, scale_stride, zero_stride, num_iterations, GROUP_COLUMNS, BITS,
            PACKS_ROWS, ZERO_ONES, IS_WHOLE, RUNS, STEPS, LOADS,
        )  # fmt: skip
    is_last = True
    if IS_SPLIT:
        size = num_outputs * NUM_HALVES
        tl.store(partial_ptr + part * size + outputs, out, mask=mask)
        if NUM_HALVES == 2:
            tl.store(partial_ptr + part * size + num_outputs + outputs, up, mask=mask)
        tl.debug_barrier()  # all of the program's sums are there before it counts
        is_last = tl.atomic_add(counts_ptr + tile, 1, sem="acq_rel") == num_splits - 1
        if is_last:
            out = _add_partial(partial_ptr + outputs, mask, size, num_splits, SPLITS_AT_ONCE)
            if NUM_HALVES == 2:
                up = _add_partial(partial_ptr + num_outputs + outputs, mask, size, num_splits, SPLITS_AT_ONCE)
            tl.store(counts_ptr + tile, 0)
    if is_last:
        if HAS_BIAS:
            out += tl.load(bias_ptr + outputs, mask=mask, other=0.0).to(tl.float32)
        if NUM_HALVES == 2:
            if HAS_BIAS:
                up += tl.load(bias_ptr + num_outputs + outputs, mask=mask, other=0.0).to(tl.float32)
            out = activate(out, ACTIVATION) * up
        tl.store(out_ptr + outputs, out.to(out_ptr.dtype.element_ty), mask=mask)


def packed_row(
    x: torch.Tensor, packed: PackedArguments, bias: torch.Tensor | None = None, activation: str = ""
) -> torch.Tensor:
    """x W^T + b, or with an activation's name act(first half) * second half of it.

    Args:
        x: contiguous [1, num_columns].
        packed: a stack of one matrix, of less than 2^31 numbers, for which `takes_packed_row` holds.

    Returns:
        [1, num_outputs], or [1, num_outputs / 2].
    """
    tiles = INTERPRETED_TILES if is_interpreted() else TILES
    return launch_packed_row(x, packed, bias, activation, tiles[packed.constants["PACKS_ROWS"]])


def launch_packed_row(
    x: torch.Tensor, packed: PackedArguments, bias: torch.Tensor | None, activation: str, tile: Tile
) -> torch.Tensor:
    """The launch, with the tile that one program takes."""
    block_words, runs, steps, loads, num_warps, num_programs = tile
    num_matrix_outputs, num_columns, first_column, group_columns = packed.sizes
    constants = {name: packed.constants[name] for name in ("BITS", "PACKS_ROWS", "ZERO_ONES")}
    num = 32 // constants["BITS"]
    word_outputs, row_columns = (num, 1) if constants["PACKS_ROWS"] else (1, num)
    num_outputs = num_matrix_outputs // 2 if activation else num_matrix_outputs
    while group_columns % (steps * row_columns) or first_column % (steps * row_columns):
        steps //= 2
    num_tiles = triton.cdiv(num_outputs, block_words * word_outputs)
    num_blocks = triton.cdiv(num_columns, runs * steps * row_columns)
    wanted = 1 if num_tiles > MAX_TILES else num_programs * num_multiprocessors(x.device) // num_tiles
    num_iterations = triton.cdiv(num_blocks, max(1, min(wanted, num_blocks, MOST_SPLITS)))
    # Rather somewhat fewer splits than some columns that are not there: those would mask all loads.
    whole = (number for number in range(num_iterations, 2 * num_iterations) if num_blocks % number == 0)
    num_iterations = next(whole, num_iterations)
    splits = triton.cdiv(num_blocks, num_iterations)
    out = torch.empty((1, num_outputs), dtype=x.dtype, device=x.device)
    partial = counts = out  # not touched
    if splits > 1:
        partial = torch.empty((splits, num_matrix_outputs), dtype=torch.float32, device=x.device)
        counts = counts_of(x.device)
    values, scales, _, zeros, *_ = packed.pointers
    early = can_launch_early(x.device)
    _packed_row_kernel[(num_tiles, splits)](
        x, values, scales, zeros, x if bias is None else bias, out, partial, counts, num_outputs, num_columns,
        first_column, packed.strides[1], packed.strides[3], packed.strides[5], num_iterations,
        splits, GROUP_COLUMNS=group_columns, **constants, HAS_BIAS=bias is not None, ACTIVATION=activation,
        IS_WHOLE=num_outputs % (block_words * word_outputs) == 0
        and num_columns == splits * num_iterations * runs * steps * row_columns,
        BLOCK_WORDS=block_words, RUNS=runs, STEPS=steps, LOADS=min(loads, steps), IS_SPLIT=splits > 1,
        EARLY=early, num_warps=num_warps, maxnreg=MOST_REGISTERS, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
