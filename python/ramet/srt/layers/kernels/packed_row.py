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

# (words beside each other, those of them that a thread has, rows of words that it has, pieces of columns, stages of the
# loads, warps, programs for a multiprocessor). A thread has all steps where words / its words * pieces = 32 * warps.
Tile = tuple[int, int, int, int, int, int, int]
TILES: dict[bool, Tile] = {
    True: (64, 2, 16, 4, 3, 4, 4),
    False: (128, 4, 4, 4, 3, 4, 4),
}  # by whether words hold outputs
INTERPRETED_TILES: dict[bool, Tile] = {True: (4, 4, 4, 8, 1, 4, 1), False: (32, 4, 4, 8, 1, 4, 1)}
MOST_SPLITS = 64
SPLITS_AT_ONCE = tl.constexpr(16)  # that are added up
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
def _step_of(tile, step: tl.constexpr):
    """One step of words [steps, ...]. As a thread has all steps, the compiler leaves nothing of the sum."""
    steps = tl.arange(0, tile.shape[0])[:, None, None]
    return tl.sum(tl.where(steps == step, tile, 0), axis=0)


@triton.jit
def _load(ptrs, mask, IS_WHOLE: tl.constexpr):
    return tl.load(ptrs) if IS_WHOLE else tl.load(ptrs, mask=mask, other=0)


@triton.jit
def _load_words(
    values_ptr, piece, word_outputs, num_word_rows, num_words, stride, STEPS: tl.constexpr, IS_WHOLE: tl.constexpr
):
    """Words [steps, pieces, words]."""
    rows = piece[None, :] * STEPS + tl.arange(0, STEPS)[:, None]
    ptrs = values_ptr + (rows * stride)[:, :, None] + word_outputs[None, None, :]
    return _load(ptrs, (rows < num_word_rows)[:, :, None] & (word_outputs < num_words)[None, None, :], IS_WHOLE)


@triton.jit
def _prefetch_words(
    values_ptr, piece, first_word, num_word_rows, num_words, stride, STEPS: tl.constexpr, WORDS: tl.constexpr
):
    """Bring the words of pieces into the L2 cache, a sector of 32 bytes with each instruction."""
    rows = tl.minimum(piece[None, :] * STEPS + tl.arange(0, STEPS)[:, None], num_word_rows - 1)
    word_outputs = tl.minimum(first_word + tl.arange(0, WORDS // 8) * 8, num_words - 1)
    ptrs = values_ptr + (rows * stride)[:, :, None] + word_outputs[None, None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _load_x(x_ptr, columns, num_columns, IS_WHOLE: tl.constexpr):
    return _load(x_ptr + columns, columns < num_columns, IS_WHOLE).to(tl.float32) * X_UNIT


@triton.jit
def _sum_outputs_of_words(words, zeros, x_ptr, first_rows, num_columns, IS_WHOLE: tl.constexpr):
    """Of AWQ's words [steps, pieces, words]: the sums over the steps of x times number less zero, [pieces, outputs].

    In a word are the outputs 0, 2, 4, 6, 1, 3, 5, 7.
    """
    sums = tl.zeros([words.shape[1], words.shape[2]], tl.float32)
    x_sums = tl.zeros([words.shape[1], 1], tl.float32)
    sums_1, sums_2, sums_3, sums_4, sums_5, sums_6, sums_7 = sums, sums, sums, sums, sums, sums, sums
    for step in tl.static_range(words.shape[0]):
        word = _step_of(words, step)
        x = _load_x(x_ptr, first_rows + step, num_columns, IS_WHOLE)
        x_sums += x
        sums += x * _numbers_at(word, 0, 4)
        sums_2 += x * _numbers_at(word, 1, 4)
        sums_4 += x * _numbers_at(word, 2, 4)
        sums_6 += x * _numbers_at(word, 3, 4)
        sums_1 += x * _numbers_at(word, 4, 4)
        sums_3 += x * _numbers_at(word, 5, 4)
        sums_5 += x * _numbers_at(word, 6, 4)
        sums_7 += x * _numbers_at(word, 7, 4)
    sums_04 = tl.join(_less_zeros(sums, zeros, x_sums, 0), _less_zeros(sums_4, zeros, x_sums, 2))
    sums_26 = tl.join(_less_zeros(sums_2, zeros, x_sums, 1), _less_zeros(sums_6, zeros, x_sums, 3))
    sums_15 = tl.join(_less_zeros(sums_1, zeros, x_sums, 4), _less_zeros(sums_5, zeros, x_sums, 6))
    sums_37 = tl.join(_less_zeros(sums_3, zeros, x_sums, 5), _less_zeros(sums_7, zeros, x_sums, 7))
    sums = tl.join(tl.join(sums_04, sums_26), tl.join(sums_15, sums_37))
    return tl.reshape(sums, (words.shape[1], words.shape[2] * 8))


@triton.jit
def _less_zeros(sums, zeros, x_sums, PLACE: tl.constexpr):
    return (sums - _numbers_at(zeros, PLACE, 4) * x_sums) * _place_unit(PLACE, 4)


@triton.jit
def _sum_columns_of_words(words, zeros, x_ptr, first_rows, num_columns, BITS: tl.constexpr, IS_WHOLE: tl.constexpr):
    """The same of GPTQ's words, in each of which are columns of one output; `zeros` are such of the place 0."""
    NUM: tl.constexpr = 32 // BITS
    sums = tl.zeros([words.shape[1], words.shape[2]], tl.float32)
    x_sums = tl.zeros([words.shape[1], 1], tl.float32)
    for step in tl.static_range(words.shape[0]):
        word = _step_of(words, step)
        for place in tl.static_range(NUM):
            x = _load_x(x_ptr, (first_rows + step) * NUM + place, num_columns, IS_WHOLE)
            x_sums += x
            sums += x * _place_unit(place, BITS) * _numbers_at(word, place, BITS)
    return sums - _numbers_at(zeros, 0, BITS) * x_sums


@triton.jit
def _sum_columns(
    x_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    word_outputs,
    outputs,
    first_output,
    first_piece,
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
    STEPS: tl.constexpr,
    PIECES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The outputs from `first_output` on for the program's columns."""
    NUM: tl.constexpr = 32 // BITS
    ROW_COLUMNS: tl.constexpr = 1 if PACKS_ROWS else NUM
    num_word_rows = num_columns // ROW_COLUMNS
    num_words = num_outputs // NUM if PACKS_ROWS else num_outputs
    piece = first_piece + tl.arange(0, PIECES)
    mask = (outputs < num_outputs)[None, :]
    matrix_outputs = first_output + outputs
    places = (matrix_outputs % NUM * BITS)[None, :]
    totals = tl.zeros([PIECES, outputs.shape[0]], tl.float32)
    for _ in tl.range(0, num_iterations, num_stages=STAGES):
        words = _load_words(values_ptr, piece, word_outputs, num_word_rows, num_words, value_stride, STEPS, IS_WHOLE)
        groups = (first_column + piece * (STEPS * ROW_COLUMNS)) // GROUP_COLUMNS
        group_mask = (piece * STEPS < num_word_rows)[:, None] & mask
        scales = _load(scales_ptr + (groups * scale_stride)[:, None] + matrix_outputs[None, :], group_mask, IS_WHOLE)
        zero_ptrs = zeros_ptr + (groups * zero_stride)[:, None]
        first_rows = (piece * STEPS)[:, None]
        if PACKS_ROWS:
            zero_mask = (piece * STEPS < num_word_rows)[:, None] & (word_outputs < num_words)[None, :]
            zero_words = first_output // NUM + word_outputs
            zeros = _load(zero_ptrs + zero_words[None, :], zero_mask, IS_WHOLE) + ZERO_ONES
            sums = _sum_outputs_of_words(words, zeros, x_ptr, first_rows, num_columns, IS_WHOLE)
        else:
            zeros = _load(zero_ptrs + (matrix_outputs // NUM)[None, :], group_mask, IS_WHOLE) + ZERO_ONES
            sums = _sum_columns_of_words(words, zeros >> places, x_ptr, first_rows, num_columns, BITS, IS_WHOLE)
        totals += scales * sums
        piece += PIECES
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
    THREAD_WORDS: tl.constexpr,
    STEPS: tl.constexpr,
    PIECES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program makes the outputs of BLOCK_WORDS words, with ACTIVATION those of both halves, from some columns.

    A thread has STEPS rows of words at a time, all in one group of columns; PIECES such runs lie after each other.
    Each program leaves its sums, and the last one of a tile adds them up, always in the same order. `counts` tells how
    many of a tile have come, and is zero again after. Strides are those from row to row of words or groups.
    The first words go to the L2 cache before the wait for the kernel that makes x: nothing writes weights.
    """
    NUM: tl.constexpr = 32 // BITS
    WORD_OUTPUTS: tl.constexpr = NUM if PACKS_ROWS else 1
    NUM_HALVES: tl.constexpr = 1 if ACTIVATION == "" else 2
    tile, part = tl.program_id(0), tl.program_id(1)
    word_outputs = tl.max_contiguous(tile * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS), THREAD_WORDS)
    outputs = tile * (BLOCK_WORDS * WORD_OUTPUTS) + tl.arange(0, BLOCK_WORDS * WORD_OUTPUTS)
    mask = outputs < num_outputs
    first_piece = part * num_iterations * PIECES
    if EARLY:
        piece = first_piece + tl.arange(0, PIECES)
        num_word_rows, num_words = num_columns * WORD_OUTPUTS // NUM, num_outputs // WORD_OUTPUTS
        first_word = tile * BLOCK_WORDS
        _prefetch_words(values_ptr, piece, first_word, num_word_rows, num_words, value_stride, STEPS, BLOCK_WORDS)
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    out = _sum_columns(
        x_ptr, values_ptr, scales_ptr, zeros_ptr, word_outputs, outputs, 0, first_piece, num_outputs, num_columns,
        first_column, value_stride, scale_stride, zero_stride, num_iterations, GROUP_COLUMNS, BITS, PACKS_ROWS,
        ZERO_ONES, IS_WHOLE, STEPS, PIECES, STAGES,
    )  # fmt: skip
    up = out
    if NUM_HALVES == 2:
        values_ptr += num_outputs // WORD_OUTPUTS
        up = _sum_columns(
            x_ptr, values_ptr, scales_ptr, zeros_ptr, word_outputs, outputs, num_outputs, first_piece, num_outputs,
            num_columns, first_column, value_stride, scale_stride, zero_stride, num_iterations, GROUP_COLUMNS, BITS,
            PACKS_ROWS, ZERO_ONES, IS_WHOLE, STEPS, PIECES, STAGES,
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
    block_words, thread_words, steps, pieces, stages, num_warps, num_programs = tile
    num_matrix_outputs, num_columns, first_column, group_columns = packed.sizes
    constants = {name: packed.constants[name] for name in ("BITS", "PACKS_ROWS", "ZERO_ONES")}
    num = 32 // constants["BITS"]
    word_outputs, row_columns = (num, 1) if constants["PACKS_ROWS"] else (1, num)
    num_outputs = num_matrix_outputs // 2 if activation else num_matrix_outputs
    while group_columns % (steps * row_columns) or first_column % (steps * row_columns):
        steps //= 2
    num_tiles = triton.cdiv(num_outputs, block_words * word_outputs)
    num_blocks = triton.cdiv(num_columns, steps * row_columns * pieces)
    wanted = 1 if num_tiles > MAX_TILES else num_programs * num_multiprocessors(x.device) // num_tiles
    num_iterations = triton.cdiv(num_blocks, max(1, min(wanted, num_blocks, MOST_SPLITS)))
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
        and num_columns == splits * num_iterations * pieces * steps * row_columns,
        BLOCK_WORDS=block_words, THREAD_WORDS=thread_words, STEPS=steps, PIECES=pieces, IS_SPLIT=splits > 1,
        STAGES=stages, EARLY=early, num_warps=num_warps, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
