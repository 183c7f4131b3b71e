"""Owns finding each row's best token in one launch: torch takes eight to look for it and for what is not finite."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early, next_power_of_2, num_multiprocessors
from ramet.srt.layers.kernels.split_sums import MAX_TILES, counts_of

BLOCK = 1024  # columns at a time
NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def _first_of_best(values, columns):
    best = tl.max(values, axis=0)
    return best, tl.min(tl.where(values == best, columns, NO_COLUMN), axis=0)


@triton.jit(do_not_specialize=["num_splits", "split_columns"])
def _best_token_kernel(
    logits_ptr,
    partial_ptr,
    columns_ptr,
    counts_ptr,
    out_ptr,
    stride,
    num_columns,
    num_splits,
    split_columns,
    INVALID: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program finds the best of a row's split_columns columns; the last one of a row, the best of all.

    `counts` tells how many of a row have come, and is zero again after.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    first = split * split_columns
    end = tl.minimum(first + split_columns, num_columns)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_column = tl.full([BLOCK], NO_COLUMN, tl.int32)
    for start in range(first, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * stride + columns, mask=columns < end, other=float("-inf")).to(tl.float32)
        logits = tl.where(logits == logits, logits, float("inf"))  # NaN makes the row as invalid as infinity
        best_column = tl.where(logits > best, columns, best_column)
        best = tl.maximum(best, logits)
    value, column = _first_of_best(best, best_column)
    tl.store(partial_ptr + row * num_splits + split, value)
    tl.store(columns_ptr + row * num_splits + split, column)
    tl.debug_barrier()  # the program's best is there before it counts
    if tl.atomic_add(counts_ptr + row, 1, sem="acq_rel") == num_splits - 1:
        splits = tl.arange(0, BLOCK_SPLITS)
        mask = splits < num_splits
        values = tl.load(partial_ptr + row * num_splits + splits, mask=mask, other=float("-inf"))
        columns = tl.load(columns_ptr + row * num_splits + splits, mask=mask, other=NO_COLUMN)
        value, column = _first_of_best(values, columns)
        is_finite = tl.abs(value) < float("inf")
        tl.store(out_ptr + row, tl.where(is_finite, column, INVALID).to(tl.int64))
        tl.store(counts_ptr + row, 0)


def best_tokens(logits: torch.Tensor, invalid: int) -> torch.Tensor:
    """int64 [num_rows]: the column of each row's largest number, the first of equals; `invalid` where that is NaN or
    infinite.

    Args:
        logits: [num_rows, num_columns], at most MAX_TILES rows, each contiguous.
    """
    num_rows, num_columns = logits.shape
    assert num_rows <= MAX_TILES and logits.stride(1) == 1
    device = logits.device
    out = torch.empty(num_rows, dtype=torch.int64, device=device)
    num_blocks = triton.cdiv(num_columns, BLOCK)
    num_splits = max(1, min(num_blocks, 2 * num_multiprocessors(device) // max(1, num_rows)))
    split_columns = triton.cdiv(num_blocks, num_splits) * BLOCK
    num_splits = triton.cdiv(num_columns, split_columns)
    partial = torch.empty((num_rows, num_splits), dtype=torch.float32, device=device)
    columns = torch.empty((num_rows, num_splits), dtype=torch.int32, device=device)
    early = can_launch_early(device)
    _best_token_kernel[(num_rows, num_splits)](
        logits, partial, columns, counts_of(device), out, logits.stride(0), num_columns, num_splits, split_columns,
        INVALID=invalid, BLOCK=BLOCK, BLOCK_SPLITS=next_power_of_2(2 * num_multiprocessors(device)), EARLY=early,
        num_warps=4, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
