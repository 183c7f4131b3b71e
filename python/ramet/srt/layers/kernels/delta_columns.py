"""Owns where a gated delta net's kernels find a head's columns in what the projections give; see DeltaHeads."""

import triton
import triton.language as tl


@triton.jit
def channel_columns(
    channels, NUM_KEYS: tl.constexpr, KEY_DIM: tl.constexpr, VALUES: tl.constexpr, GROUPED: tl.constexpr
):
    """Columns of some of the convolution's channels, which are queries, keys and values of all heads.

    Args:
        NUM_KEYS: key heads.
        VALUES: columns of the values of a key head.
    """
    columns = channels
    if GROUPED:
        is_value = channels >= 2 * NUM_KEYS * KEY_DIM
        is_key = (channels >= NUM_KEYS * KEY_DIM) & (channels < 2 * NUM_KEYS * KEY_DIM)
        local = channels - tl.where(is_value, 2 * NUM_KEYS * KEY_DIM, tl.where(is_key, NUM_KEYS * KEY_DIM, 0))
        size = tl.where(is_value, VALUES, KEY_DIM)
        first = tl.where(is_value, 2 * KEY_DIM, tl.where(is_key, KEY_DIM, 0))
        columns = local // size * (2 * KEY_DIM + 2 * VALUES) + first + local % size
    return columns


@triton.jit
def gate_column(
    head, NUM_KEYS: tl.constexpr, REPEATS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """The first column of a value head's gate; REPEATS value heads have one key head."""
    column = 2 * NUM_KEYS * KEY_DIM + (NUM_KEYS * REPEATS + head) * VALUE_DIM
    if GROUPED:
        size = 2 * KEY_DIM + 2 * REPEATS * VALUE_DIM
        column = head // REPEATS * size + 2 * KEY_DIM + (REPEATS + head % REPEATS) * VALUE_DIM
    return column


@triton.jit
def number_columns(head, NUM_KEYS: tl.constexpr, REPEATS: tl.constexpr, GROUPED: tl.constexpr):
    """Of a value head: the columns of what says how much is written, and how much is forgotten."""
    first = head
    second = NUM_KEYS * REPEATS + head
    if GROUPED:
        first = head // REPEATS * (2 * REPEATS) + head % REPEATS
        second = first + REPEATS
    return first, second


@triton.jit
def kept_and_written(b, a, a_log_ptr, dt_bias_ptr, head):
    """Of a value head, in float32: the logarithm of what is kept, and the share that is written."""
    shifted = a.to(tl.float32) + tl.load(dt_bias_ptr + head)
    softplus = tl.where(shifted > 20.0, shifted, tl.log(1.0 + tl.exp(tl.minimum(shifted, 20.0))))
    return -tl.exp(tl.load(a_log_ptr + head)) * softplus, tl.sigmoid(b.to(tl.float32))
