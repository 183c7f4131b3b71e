"""Owns the choice of the keys with the highest scores: a radix select, one program for each token.

Digit by digit from the highest, it counts the scores with each digit and finds that of the last one to be chosen.
"""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early, is_interpreted

DIGITS = tl.constexpr(256)


@triton.jit
def _ordered(scores):
    """float32 -> int64 below 2**32 in the same order; -0 is 0."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def _slots(table_ptr, positions, mask, PAGE_SIZE: tl.constexpr):
    pages = tl.load(table_ptr + positions // PAGE_SIZE, mask=mask, other=0)
    return (pages * PAGE_SIZE + positions % PAGE_SIZE).to(tl.int32)


@triton.jit
def _highest(scores_ptr, num_keys, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """The TOP_K-th highest of more scores, as `_ordered` has it, and how many of those that are equal are chosen."""
    digits = tl.arange(0, DIGITS)
    prefix = tl.zeros([], tl.int64)
    missing = tl.full([], TOP_K, tl.int32)
    for place in tl.static_range(4):
        counts = tl.zeros([DIGITS], tl.int32)
        for start in tl.range(0, num_keys, BLOCK, num_stages=3):  # else each load would wait for the one before it
            positions = start + tl.arange(0, BLOCK)
            mask = positions < num_keys
            order = _ordered(tl.load(scores_ptr + positions, mask=mask, other=0.0))
            mask = mask & ((order >> (32 - 8 * place)) == prefix)
            counts += tl.histogram(((order >> (24 - 8 * place)) & 255).to(tl.int32), DIGITS, mask=mask)
        from_above = tl.cumsum(counts, axis=0, reverse=True)  # scores with this digit or a higher one
        digit = tl.max(tl.where(from_above >= missing, digits, 0), axis=0)
        missing -= tl.sum(tl.where(digits > digit, counts, 0), axis=0)
        prefix = prefix * 256 + digit.to(tl.int64)
    return prefix, missing


# Positions and rows are parts of what a pass is told at once, from any token on: they begin anywhere.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "rows_ptr"])
def _choose_kernel(
    scores_ptr,
    table_ptr,
    rows_ptr,
    positions_ptr,
    chosen_ptr,
    scores_stride,
    table_stride,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program writes the slots of one token's keys, in the order of their positions; of equal ones, the first."""
    token = tl.program_id(0).to(tl.int64)
    scores_ptr += token * scores_stride
    chosen_ptr += token * TOP_K
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_keys = tl.load(positions_ptr + token).to(tl.int32) + 1
    table_ptr += tl.load(rows_ptr + token).to(tl.int64) * table_stride
    if num_keys <= TOP_K:
        for start in range(0, num_keys, BLOCK):
            positions = start + tl.arange(0, BLOCK)
            mask = positions < num_keys
            tl.store(chosen_ptr + positions, _slots(table_ptr, positions, mask, PAGE_SIZE), mask=mask)
    else:
        threshold, num_ties = _highest(scores_ptr, num_keys, TOP_K, BLOCK)
        num_chosen = tl.zeros([], tl.int32)
        num_equal = tl.zeros([], tl.int32)
        for start in range(0, num_keys, BLOCK):
            positions = start + tl.arange(0, BLOCK)
            mask = positions < num_keys
            order = _ordered(tl.load(scores_ptr + positions, mask=mask, other=0.0))
            is_equal = mask & (order == threshold)
            equal = is_equal.to(tl.int32)
            is_chosen = mask & (order > threshold)
            is_chosen = is_chosen | (is_equal & (num_equal + tl.cumsum(equal, axis=0) <= num_ties))
            chosen = is_chosen.to(tl.int32)
            places = num_chosen + tl.cumsum(chosen, axis=0) - 1
            tl.store(chosen_ptr + places, _slots(table_ptr, positions, is_chosen, PAGE_SIZE), mask=is_chosen)
            num_chosen += tl.sum(chosen, axis=0)
            num_equal += tl.sum(equal, axis=0)


def choose_keys(
    scores: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    chosen: torch.Tensor,
    *,
    page_size: int,
) -> None:
    """Write the slots of the keys with the highest scores, or of all that a token sees if they are not more.

    Args:
        scores: as `index_scores` has written them; no NaN is expected, which counts as more or less than all others.
        table, rows, positions: as there.
        chosen: contiguous int32 [num_tokens, top_k]; what is behind a token's keys stays as it is.
    """
    num_tokens, top_k = chosen.shape
    assert chosen.is_contiguous() and scores.stride(1) == 1 == table.stride(1)
    early = can_launch_early(scores.device)
    _choose_kernel[(num_tokens,)](
        scores,
        table,
        rows,
        positions,
        chosen,
        scores.stride(0),
        table.stride(0),
        TOP_K=top_k,
        BLOCK=256 if is_interpreted() else 2048,
        PAGE_SIZE=page_size,
        EARLY=early,
        num_warps=8,
        **({"launch_pdl": True} if early else {}),
    )
