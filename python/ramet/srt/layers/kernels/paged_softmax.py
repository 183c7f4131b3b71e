"""Owns what the attention kernels share: finding keys in their pages, and folding a block of them into a softmax."""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # softmax runs in base 2: the scale of the scores is multiplied by it


@triton.jit
def key_offsets(table_ptr, positions, valid, cache_stride, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Where the keys at `positions` of a sequence start in the cache; its pages are listed at `table_ptr`."""
    if MASKED:
        pages = tl.load(table_ptr + positions // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
    else:
        pages = tl.load(table_ptr + positions // PAGE_SIZE).to(tl.int64)
    return (pages * PAGE_SIZE + positions % PAGE_SIZE) * cache_stride


@triton.jit
def fold_block(
    acc, total, maximum, scores, v_ptrs, v_mask, PRECISION: tl.constexpr, MAY_BE_HIDDEN: tl.constexpr
):  # fmt: skip
    """A block of scores and values in a running softmax (Milakov and Gimelshein, 2018).

    Args:
        acc, total, maximum: the weighted sum of the values so far, the sum of the weights, the highest score.
        scores: [rows, keys] in base 2; -inf hides a key.
        MAY_BE_HIDDEN: whether a row may have seen no key at all so far.

    Returns:
        acc, total and maximum with the block.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    shift = new_maximum
    if MAY_BE_HIDDEN:
        # A row that has seen no key yet keeps -inf; subtracting 0 instead gives it probabilities of 0, not NaN.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    probs = tl.exp2(scores - shift[:, None])
    correction = tl.exp2(maximum - shift)
    v = tl.load(v_ptrs, mask=v_mask, other=0.0)
    acc = tl.dot(probs.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
    return acc, total * correction + tl.sum(probs, axis=1), new_maximum
