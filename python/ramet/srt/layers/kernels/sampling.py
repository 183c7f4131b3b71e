"""Owns the kernel that finds how small a probability top_k, top_p and min_p keep, without sorting the vocabulary."""

import torch
import triton
import triton.language as tl

BLOCK = 8192


@triton.jit
def _above(probs_ptr, vocab_size, value, BLOCK: tl.constexpr):
    """(sum, number) of a row's probabilities greater than `value`."""
    mass = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        probs = tl.load(probs_ptr + columns, mask=columns < vocab_size, other=0.0)
        is_above = probs > value
        mass += tl.where(is_above, probs, 0.0)
        count += is_above.to(tl.int32)
    return tl.sum(mass, axis=0), tl.sum(count, axis=0)


@triton.jit
def _least_kept_kernel(probs_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr, out_ptr, stride, vocab_size, BLOCK: tl.constexpr):
    """One program searches one row. Positive floats are ordered as their bits are, so the search is over integers.

    A token is kept while fewer than top_k are likelier, and while those that are likelier have at most top_p of what
    top_k keeps. Both hold from some probability upwards: the least of those is what is looked for.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = probs_ptr + row * stride
    best = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(row_ptr + columns, mask=columns < vocab_size, other=0.0))
    highest = tl.max(best, axis=0)
    highest_bits = highest.to(tl.int32, bitcast=True)

    least_bits = tl.zeros([], tl.int32)
    total = tl.full([], 1.0, tl.float32)
    top_k = tl.load(top_ks_ptr + row)
    if top_k < vocab_size:
        high = highest_bits
        while least_bits < high:
            middle = least_bits + (high - least_bits) // 2
            _, count = _above(row_ptr, vocab_size, middle.to(tl.float32, bitcast=True), BLOCK)
            is_kept = count < top_k
            high = tl.where(is_kept, middle, high)
            least_bits = tl.where(is_kept, least_bits, middle + 1)
        # What is not less than this float is greater than the one before it.
        total, _ = _above(row_ptr, vocab_size, tl.maximum(least_bits - 1, 0).to(tl.float32, bitcast=True), BLOCK)
    top_p = tl.load(top_ps_ptr + row)
    if top_p < 1.0:
        high = highest_bits
        while least_bits < high:
            middle = least_bits + (high - least_bits) // 2
            mass, _ = _above(row_ptr, vocab_size, middle.to(tl.float32, bitcast=True), BLOCK)
            is_kept = mass <= top_p * total
            high = tl.where(is_kept, middle, high)
            least_bits = tl.where(is_kept, least_bits, middle + 1)
    least = tl.maximum(least_bits.to(tl.float32, bitcast=True), tl.load(min_ps_ptr + row) * highest)
    tl.store(out_ptr + row, least)


def least_kept(probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor) -> torch.Tensor:
    """float32 [batch_size, 1]: the lowest probability of each row that is kept.

    Args:
        probs: float32 [batch_size, vocab_size], each row contiguous.
        top_ks: int64 [batch_size, 1]; the vocabulary size where there is no limit.
        top_ps, min_ps: float32 [batch_size, 1].
    """
    batch_size, vocab_size = probs.shape
    out = torch.empty((batch_size, 1), dtype=torch.float32, device=probs.device)
    _least_kept_kernel[(batch_size,)](
        probs, top_ks, top_ps, min_ps, out, probs.stride(0), vocab_size, BLOCK=BLOCK, num_warps=16
    )
    return out
