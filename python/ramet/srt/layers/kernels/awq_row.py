"""Owns the product of a single row with AWQ's words, in Gluon: Triton's language with explicit layouts.

A decode pass of one request is bound by reading the weights, and by how soon a kernel has something to read. Words are
copied to shared memory several steps ahead, the first ones before x is there, and are read from it just as the matrix
units want their numbers: one thread has all eight numbers of a word. Triton alone brings them there by detours.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ramet.srt.layers.kernels.activation import activate
from ramet.srt.layers.kernels.awq_row_layouts import MAX_GROUPS, NUM, STEP, TILE, Tile, scales_layout, words_layout
from ramet.srt.layers.kernels.packed_weights import PackedArguments
from ramet.srt.layers.kernels.runtime import can_launch_early, is_interpreted, next_power_of_2, num_multiprocessors
from ramet.srt.layers.kernels.split_sums import MAX_TILES, counts_of

MAX_SPLITS = 64
SPLITS_AT_ONCE = tl.constexpr(16)

# Triton 3.9 has other names for these.
_copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


# Numbers of four bits at the eight places of two words each, as pairs of float16: 1024 and the number, and at odd
# places sixteen times the number, which saves every other shift.
def _unpacking() -> str:
    lines = [".reg .b32 low, high;", "prmt.b32 low, $8, $9, 0x5410;", "prmt.b32 high, $8, $9, 0x7632;"]
    for half, place in (("low", 0), ("high", 4)):
        for shift in (0, 2):
            lines += [f"shr.b32 {half}, {half}, 8;"] if shift else []
            lines.append(f"lop3.b32 ${place + shift}, {half}, 0x000F000F, 0x64006400, 0xEA;")
            lines.append(f"lop3.b32 ${place + shift + 1}, {half}, 0x00F000F0, 0x64006400, 0xEA;")
    return "{" + " ".join(lines) + "}"


UNPACK = tl.constexpr(_unpacking())


@gluon.jit
def _word_of(row, WORDS: gl.constexpr, NUM_WARPS: gl.constexpr):
    """The word whose numbers are in a row of the product."""
    return (row // 16) % NUM_WARPS * (8 * WORDS) + row % 8 * WORDS + row // (16 * NUM_WARPS) * 2 + row // 8 % 2


@gluon.jit
def _finished(total, x_sums, zeros, scales, PLACE: gl.constexpr, LAYOUT: gl.constexpr):
    """The outputs at a place of words, summed over the groups of columns."""
    FACTOR: gl.constexpr = 16.0 if PLACE % 2 else 1.0
    zero = ((zeros >> (PLACE * 4)) & 15).to(gl.float32) * FACTOR + 1024.0
    scale = gl.convert_layout(scales, LAYOUT, assert_trivial=True).to(gl.float32) * (1 / FACTOR)
    return gl.sum(scale * (total - x_sums * zero), axis=1)


@gluon.jit
def _sum_of_splits(ptrs, num_splits, split_stride, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """The sum of num_splits vectors of SIZE numbers, always in the same order."""
    total = gl.zeros([SIZE], gl.float32, gl.SliceLayout(0, LAYOUT))
    for first in range(0, num_splits, SPLITS_AT_ONCE):
        splits = first + gl.arange(0, SPLITS_AT_ONCE, gl.SliceLayout(1, LAYOUT))
        split_ptrs = ptrs[None, :] + splits[:, None] * split_stride
        total += gl.sum(gl.load(split_ptrs, mask=(splits < num_splits)[:, None], other=0.0), axis=0)
    return total


@gluon.jit
def _finish_tile(
    out_ptr,
    partial_ptr,
    bias_ptr,
    counts_ptr,
    num_words,
    TILE_WORDS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    """Add up the sums of all splits, if this program is the last one of its tile, or of one in each half."""
    _barrier()  # all of the program's sums are there before it counts
    num_halves: gl.constexpr = 1 if ACTIVATION == "" else 2
    num_tiles, num_splits = gl.num_programs(0), gl.num_programs(1)
    half_tile = gl.program_id(0) % (num_tiles // num_halves)
    if gl.atomic_add(counts_ptr + half_tile, 1, sem="acq_rel") == num_splits * num_halves - 1:
        SUM: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, NUM_WARPS], [1, 0])
        outputs = half_tile * TILE_WORDS * NUM + gl.arange(0, TILE_WORDS * NUM, gl.SliceLayout(0, SUM))
        num_outputs = num_words * NUM
        width = num_outputs // num_halves
        y = _sum_of_splits(partial_ptr + outputs, num_splits, num_outputs, TILE_WORDS * NUM, SUM)
        if HAS_BIAS:
            y += gl.load(bias_ptr + outputs, mask=outputs < width, other=0.0).to(gl.float32)
        if num_halves == 2:
            up = _sum_of_splits(partial_ptr + width + outputs, num_splits, num_outputs, TILE_WORDS * NUM, SUM)
            if HAS_BIAS:
                up += gl.load(bias_ptr + width + outputs, mask=outputs < width, other=0.0).to(gl.float32)
            y = activate(y, ACTIVATION) * up
        gl.store(out_ptr + outputs, y.to(out_ptr.dtype.element_ty), mask=outputs < width)
        gl.store(counts_ptr + half_tile, 0)


@gluon.jit
def _gated(parts_ptr, columns, mask, size, PARTS: gl.constexpr, ACTIVATION: gl.constexpr):
    """act(first half) * second half of a row in parts, at some columns of `size`."""
    gate = gl.load(parts_ptr + columns, mask=mask, other=0.0)
    up = gl.load(parts_ptr + size + columns, mask=mask, other=0.0)
    for part in gl.static_range(1, PARTS):
        gate += gl.load(parts_ptr + part * 2 * size + columns, mask=mask, other=0.0)
        up += gl.load(parts_ptr + (part * 2 + 1) * size + columns, mask=mask, other=0.0)
    return activate(gate, ACTIVATION) * up


@gluon.jit
def _read_x(
    x_ptr, columns, mask, num_columns, INPUT: gl.constexpr, PARTS: gl.constexpr, ACTIVATION: gl.constexpr
):  # fmt: skip
    """The row's numbers at some columns, but for a norm's factor; see Input."""
    if INPUT == "gated":
        x = _gated(x_ptr, columns, mask, num_columns, PARTS, ACTIVATION)
    else:
        x = gl.load(x_ptr + columns, mask=mask, other=0.0)
    return x


@gluon.jit
def _norm_factor(squares_ptr, num_squares, size, eps, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    """1 / sqrt(mean of the squares + eps)."""
    places = gl.arange(0, BLOCK, LAYOUT)
    total = gl.sum(gl.load(squares_ptr + places, mask=places < num_squares, other=0.0), axis=0)
    return tl.rsqrt(total / size + eps)


@gluon.jit(do_not_specialize=["num_groups", "each"])
def _awq_row_kernel(
    x_ptr,
    squares_ptr,
    values_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counts_ptr,
    num_words,
    num_groups,
    each,
    value_stride,
    scale_stride,
    zero_stride,
    num_squares,
    eps,
    INPUT: gl.constexpr,
    X_PARTS: gl.constexpr,
    BLOCK_SQUARES: gl.constexpr,
    LEAVES_SUMS: gl.constexpr,
    GROUP: gl.constexpr,
    X_GROUPS: gl.constexpr,
    WORDS: gl.constexpr,
    STEP: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    WORDS_LAYOUT: gl.constexpr,
    SCALES_LAYOUT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    EARLY: gl.constexpr,
):
    """One program sums `each` groups of columns of a tile of words.

    It leaves its sums in partial[split, output]. Unless that is all that is asked for, the last one of a tile, or of
    one in each half, adds them up: `counts` tells how many of a tile have come, and is zero again after.

    INPUT is "row", "unscaled" or "gated", see Input. ACTIVATION is that of the input, or else of the output.

    The product's rows are words, and its columns are groups of columns: x is zero in those of other groups. x is scaled
    by a power of two to the upper end of float16, which has more digits than bfloat16: what is 2^29 times smaller than
    its largest number loses some.
    """
    TILE_WORDS: gl.constexpr = 8 * WORDS * NUM_WARPS
    STEPS: gl.constexpr = GROUP // STEP  # of a group
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[NUM_WARPS, 1], instr_shape=[16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [128 // TILE_WORDS, TILE_WORDS // 4], [NUM_WARPS, 1], [1, 0])
    # Threads whose columns are two apart read the same words at once: from other banks, so.
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    X: gl.constexpr = gl.BlockedLayout([4 if INPUT == "gated" else 1], [32], [NUM_WARPS], [0])
    tile, split = gl.program_id(0), gl.program_id(1)
    first_group = split * each
    there_groups = gl.minimum(num_groups - first_group, each)
    num_steps = there_groups * STEPS

    words = tile * TILE_WORDS + gl.arange(0, TILE_WORDS, gl.SliceLayout(0, COPY))
    columns = first_group * GROUP + gl.arange(0, STEP, gl.SliceLayout(1, COPY))
    ptrs = values_ptr + columns[:, None] * value_stride + words[None, :]
    are_there = (words < num_words)[None, :]
    stages = gl.allocate_shared_memory(gl.int32, [NUM_STAGES, STEP, TILE_WORDS], SHARED)
    for stage in gl.static_range(NUM_STAGES - 1):
        mask = are_there & (stage < num_steps)
        _copy_to_shared(stages.index(stage), ptrs + stage * (STEP * value_stride), mask=mask)
        async_copy.commit_group()

    rows = gl.arange(0, TILE_WORDS, gl.SliceLayout(1, gl.SliceLayout(2, SCALES_LAYOUT)))
    groups = gl.arange(0, MAX_GROUPS, gl.SliceLayout(0, gl.SliceLayout(2, SCALES_LAYOUT)))
    places = gl.arange(0, NUM, gl.SliceLayout(0, gl.SliceLayout(1, SCALES_LAYOUT)))
    scale_words = tile * TILE_WORDS + _word_of(rows, WORDS, NUM_WARPS)
    have_scales = (groups < there_groups)[None, :] & (scale_words < num_words)[:, None]
    scale_places = (first_group + groups)[None, :] * scale_stride + scale_words[:, None] * NUM
    scale_ptrs = scales_ptr + (gl.expand_dims(scale_places, 2) + places[None, None, :])
    scales = gl.load(scale_ptrs, mask=gl.expand_dims(have_scales, 2), other=0.0)
    zero_ptrs = zeros_ptr + (first_group + groups)[None, :] * zero_stride + scale_words[:, None]
    zeros = gl.convert_layout(gl.load(zero_ptrs, mask=have_scales, other=0), PRODUCT, assert_trivial=True)

    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x_columns = gl.arange(0, X_GROUPS * GROUP, X)
    x_mask = x_columns < there_groups * GROUP
    num_columns = num_groups * GROUP
    x = _read_x(x_ptr, first_group * GROUP + x_columns, x_mask, num_columns, INPUT, X_PARTS, ACTIVATION)
    factor = 1.0
    if INPUT == "unscaled":
        factor = _norm_factor(squares_ptr, num_squares, num_columns, eps, BLOCK_SQUARES, X)
    exponent = gl.max(gl.abs(x.to(gl.float32)), axis=0).to(gl.int32, bitcast=True) >> 23
    power = gl.minimum(268 - exponent, 253)  # biased as in float32, and so that 1 / 2^power is normal, too
    x_stage = gl.allocate_shared_memory(gl.float16, [X_GROUPS * GROUP], VECTOR)
    x_stage.store((x.to(gl.float32) * (power << 23).to(gl.float32, bitcast=True)).to(gl.float16))
    x_steps = _reinterpret(x_stage, gl.float16, [X_GROUPS * STEPS, STEP], VECTOR)

    group_of_product = gl.arange(0, MAX_GROUPS, gl.SliceLayout(0, RIGHT))
    ones = gl.full([TILE_WORDS, STEP], 1.0, gl.float16, LEFT)
    x_sums = gl.zeros([TILE_WORDS, MAX_GROUPS], gl.float32, PRODUCT)
    totals: tl.tuple = ()
    for _ in gl.static_range(NUM):
        totals += (x_sums,)
    for step in range(num_steps):
        async_copy.wait_group(NUM_STAGES - 2)
        next_step = step + NUM_STAGES - 1
        mask = are_there & (next_step < num_steps)
        _copy_to_shared(stages.index(next_step % NUM_STAGES), ptrs + next_step * (STEP * value_stride), mask=mask)
        async_copy.commit_group()
        values = stages.index(step % NUM_STAGES).permute([1, 0]).load(WORDS_LAYOUT)
        values = gl.permute(gl.reshape(values, [NUM_WARPS, 8, WORDS // 2, 2, STEP]), [2, 0, 3, 1, 4])
        values = gl.convert_layout(gl.reshape(values, [TILE_WORDS, STEP]), LEFT, assert_trivial=True)
        step_x = x_steps.index(step).load(gl.SliceLayout(1, RIGHT))
        is_group = (group_of_product == step // STEPS)[None, :]
        right = gl.where(is_group, step_x[:, None], gl.full([STEP, MAX_GROUPS], 0.0, gl.float16, RIGHT))
        numbers = gl.inline_asm_elementwise(
            UNPACK, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [values], dtype=(gl.float16,) * 8, is_pure=True, pack=2
        )
        x_sums = mma_v2(ones, right, x_sums)
        new: tl.tuple = ()
        for place in gl.static_range(NUM):
            new += (mma_v2(numbers[place], right, totals[place]),)
        totals = new

    # Places hold the outputs 0, 2, 4, 6, 1, 3, 5, 7: a split of scales takes their last bit first.
    even, odd = gl.split(gl.reshape(scales, [TILE_WORDS, MAX_GROUPS, 2, 2, 2]))
    low_even, high_even = gl.split(even)
    low_odd, high_odd = gl.split(odd)
    scales_0, scales_4 = gl.split(low_even)
    scales_2, scales_6 = gl.split(high_even)
    scales_1, scales_5 = gl.split(low_odd)
    scales_3, scales_7 = gl.split(high_odd)
    ordered = (scales_0, scales_2, scales_4, scales_6, scales_1, scales_3, scales_5, scales_7)
    unscaling = ((254 - power) << 23).to(gl.float32, bitcast=True) * factor
    outs: tl.tuple = ()
    for place in gl.static_range(NUM):
        outs += (_finished(totals[place], x_sums, zeros, ordered[place], place, PRODUCT) * unscaling,)
    even_out = gl.join(gl.join(outs[0], outs[2]), gl.join(outs[1], outs[3]))
    odd_out = gl.join(gl.join(outs[4], outs[6]), gl.join(outs[5], outs[7]))
    out = gl.reshape(gl.join(even_out, odd_out), [TILE_WORDS, NUM])
    OUT: gl.constexpr = out.type.layout
    out_words = tile * TILE_WORDS + _word_of(gl.arange(0, TILE_WORDS, gl.SliceLayout(1, OUT)), WORDS, NUM_WARPS)
    if LEAVES_SUMS and HAS_BIAS:
        bias_places = out_words[:, None] * NUM + gl.arange(0, NUM, gl.SliceLayout(0, OUT))[None, :]
        bias_mask = (out_words < num_words)[:, None] & (split == 0)
        out += gl.load(bias_ptr + bias_places, mask=bias_mask, other=0.0).to(gl.float32)
    out_ptrs = partial_ptr + split * num_words * NUM + out_words[:, None] * NUM
    out_ptrs += gl.arange(0, NUM, gl.SliceLayout(0, OUT))[None, :]
    gl.store(out_ptrs, out, mask=(out_words < num_words)[:, None])
    if not LEAVES_SUMS:
        _finish_tile(out_ptr, partial_ptr, bias_ptr, counts_ptr, num_words, TILE_WORDS, HAS_BIAS, ACTIVATION, NUM_WARPS)


def takes_awq_row(
    dtype: torch.dtype, device: torch.device, packed: PackedArguments, activation: str = "", tile: Tile = TILE
) -> bool:
    """Whether the matrix has whole groups of columns and, if there is an activation, whole tiles."""
    num_outputs, num_columns, first_column, group_columns = packed.sizes
    if is_interpreted() or dtype == torch.float32 or first_column or num_columns % group_columns:
        return False
    tile_outputs = 8 * tile.words * tile.num_warps * NUM.value
    if num_outputs > MAX_TILES * tile_outputs or (activation and num_outputs % (2 * tile_outputs)):
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    is_power = group_columns & (group_columns - 1) == 0
    return STEP <= group_columns <= 4 * STEP and is_power and num_columns <= MAX_SPLITS * MAX_GROUPS * group_columns


class Input(NamedTuple):
    """One row, as `awq_row_sums` takes it: whole, or see UnscaledRow and GatedSums for the fields of those."""

    values: torch.Tensor  # contiguous [1, num_columns], bfloat16 or float16; or float32 [num_parts, 2 * num_columns]
    squares: torch.Tensor | None = None
    eps: float = 0.0
    activation: str = ""


def awq_row(
    x: torch.Tensor, packed: PackedArguments, bias: torch.Tensor | None = None, activation: str = "", tile: Tile = TILE
) -> torch.Tensor:
    """x W^T + b, or with an activation's name act(first half) * second half of it.

    Args:
        x: contiguous [1, num_columns], bfloat16 or float16.
        packed: a stack of one matrix, of less than 2^31 numbers, for which `takes_awq_row` holds.

    Returns:
        [1, num_outputs], or [1, num_outputs / 2].
    """
    num_outputs = packed.sizes[0]
    out = torch.empty((1, num_outputs // 2 if activation else num_outputs), dtype=x.dtype, device=x.device)
    _launch(Input(x), packed, bias, activation, out, tile)
    return out


def awq_row_sums(x: Input, packed: PackedArguments, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What x W^T + b is the sum of, float32 [num_parts, num_outputs]. `packed` as for `awq_row`."""
    return _launch(x, packed, bias, x.activation, None, TILE)


def _launch(
    x: Input, packed: PackedArguments, bias: torch.Tensor | None, activation: str, out: torch.Tensor | None, tile: Tile
) -> torch.Tensor:
    """The parts of the product; their sum, with the activation, is in `out` if that is given."""
    num_outputs, num_columns, _, group_columns = packed.sizes
    device, kind = x.values.device, "row"
    if x.squares is not None:
        kind = "unscaled"
    elif x.activation:
        kind = "gated"
    assert x.values.is_contiguous() and x.values.shape[1] == num_columns * (2 if kind == "gated" else 1)
    num_words, num_groups = num_outputs // NUM.value, num_columns // group_columns
    num_tiles = triton.cdiv(num_words, 8 * tile.words * tile.num_warps)
    wanted = max(1, min(tile.num_programs * num_multiprocessors(device) // num_tiles, num_groups, MAX_SPLITS))
    each = min(triton.cdiv(num_groups, wanted), MAX_GROUPS.value)
    splits = triton.cdiv(num_groups, each)
    partial = torch.empty((splits, num_outputs), dtype=torch.float32, device=device)
    values, scales, _, zeros, *_ = packed.pointers
    early = can_launch_early(device)
    squares = x.values if x.squares is None else x.squares
    _awq_row_kernel[(num_tiles, splits)](
        x.values, squares, values, scales, zeros, x.values if bias is None else bias, partial if out is None else out,
        partial, counts_of(device), num_words, num_groups, each, packed.strides[1], packed.strides[3],
        packed.strides[5], len(squares), x.eps, INPUT=kind, X_PARTS=len(x.values),
        BLOCK_SQUARES=next_power_of_2(len(squares)), LEAVES_SUMS=out is None, GROUP=group_columns,
        X_GROUPS=next_power_of_2(each), WORDS=tile.words, STEP=STEP, NUM_STAGES=tile.num_stages,
        NUM_WARPS=tile.num_warps, WORDS_LAYOUT=words_layout(tile), SCALES_LAYOUT=scales_layout(tile),
        HAS_BIAS=bias is not None, ACTIVATION=activation, EARLY=early, num_warps=tile.num_warps,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return partial
