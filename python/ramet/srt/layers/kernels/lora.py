"""Owns what adapters add to a linear layer's output, where each token of a pass may have another adapter or none.

Which tokens take a slot is read on the GPU alone, so that a CUDA graph can hold the launches. Each program is for a
block of one slot's tokens; there are as many programs as there may be blocks, and each finds its own.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early, dot_precision, is_interpreted, next_power_of_2

FEW_TOKENS = 256  # what is run before the first request has fewer and more
MAX_SPLITS = 32  # of the input's columns, each summed up by programs of its own
SPLITS_AT_ONCE = tl.constexpr(8)  # that are read of these sums
MIN_DOT, MAX_RANKS = 16, 64  # rows of A or columns of B that one program takes: at least what a product needs
MAX_COLUMNS, MAX_TILE_NUMBERS = 512, 16384  # of A that one program has at a time
LONG_COLUMNS = 128  # beside many tokens
INTERPRETED_COLUMNS = 32


class Tile(NamedTuple):
    """What programs take at a time."""

    shrink_tokens: int
    expand_tokens: int
    expand_warps: int


FEW_TILE, LONG_TILE = Tile(16, 16, 4), Tile(64, 32, 8)


@triton.jit
def _block_of(by_slot_ptr, num_slots, index, BLOCK_TOKENS: tl.constexpr, BLOCK_SLOTS: tl.constexpr):
    """The slot of a block of tokens, the place of its first token, and the end of the slot's; (0, 0, 0) of no slot."""
    slots = tl.arange(0, BLOCK_SLOTS)
    starts = tl.load(by_slot_ptr + slots, mask=slots < num_slots, other=0)
    stops = tl.load(by_slot_ptr + slots + 1, mask=slots < num_slots, other=0)
    blocks = (stops - starts + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    ends = tl.cumsum(blocks, axis=0)
    slot = tl.sum((ends <= index).to(tl.int32), axis=0)
    is_slot = slots == slot
    place = tl.sum(tl.where(is_slot, starts + (index - ends + blocks) * BLOCK_TOKENS, 0), axis=0)
    return tl.where(slot < num_slots, slot, 0), place, tl.sum(tl.where(is_slot, stops, 0), axis=0)


@triton.jit
def _tokens_at(by_slot_ptr, num_slots, first, stop, BLOCK_TOKENS: tl.constexpr):
    """A block of tokens, and which of them there are."""
    places = first + tl.arange(0, BLOCK_TOKENS)
    is_mine = places < stop
    return tl.load(by_slot_ptr + num_slots + 1 + places, mask=is_mine, other=0).to(tl.int64), is_mine


# Passes of many sizes are captured: none may find that its size needs a kernel of its own.
@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def _shrink_kernel(
    x_ptr,
    by_slot_ptr,
    a_ptr,
    scales_ptr,
    inner_ptr,
    num_tokens,
    num_slots,
    num_columns,
    num_parts,
    rank,
    num_splits,
    split_columns,
    IS_ONE_BLOCK: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """inner[split, token] = scale * x A^T for a block of A's rows, those of all parts, summed over the split's columns.

    With IS_ONE_BLOCK a split has BLOCK_COLUMNS columns, and A is there before the wait for the kernel that makes
    x: slots change between passes alone.
    """
    slot, first, stop = _block_of(by_slot_ptr, num_slots, tl.program_id(0), BLOCK_TOKENS, BLOCK_SLOTS)
    split = tl.program_id(1) % num_splits
    num_rows = num_parts * rank
    rows = tl.program_id(1) // num_splits * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < tl.where(first < stop, num_rows, 0)
    columns = split * split_columns + tl.arange(0, BLOCK_COLUMNS)
    end_column = tl.minimum((split + 1) * split_columns, num_columns)
    a_ptrs = a_ptr + (slot.to(tl.int64) * num_rows + rows)[None, :] * num_columns + columns[:, None]
    if IS_ONE_BLOCK:
        a = tl.load(a_ptrs, mask=row_mask[None, :] & (columns < end_column)[:, None], other=0.0)
    scales = tl.load(scales_ptr + slot * num_parts + rows // rank, mask=row_mask, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tokens, is_mine = _tokens_at(by_slot_ptr, num_slots, first, stop, BLOCK_TOKENS)
    x_ptrs = x_ptr + tokens[:, None] * num_columns + columns[None, :]
    acc = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
    if IS_ONE_BLOCK:
        x = tl.load(x_ptrs, mask=is_mine[:, None] & (columns < end_column)[None, :], other=0.0)
        acc = tl.dot(x, a, acc, input_precision=PRECISION)
    else:
        num_mine = tl.where(first < stop, end_column - split * split_columns, 0)
        for column in range(0, num_mine, BLOCK_COLUMNS):
            column_mask = column + columns < end_column
            x = tl.load(x_ptrs + column, mask=is_mine[:, None] & column_mask[None, :], other=0.0)
            block = tl.load(a_ptrs + column, mask=row_mask[None, :] & column_mask[:, None], other=0.0)
            acc = tl.dot(x, block, acc, input_precision=PRECISION)
    inner_ptrs = inner_ptr + (split * num_tokens + tokens)[:, None] * num_rows + rows[None, :]
    tl.store(inner_ptrs, acc * scales[None, :], mask=is_mine[:, None] & row_mask[None, :])


@triton.jit
def _inner(ptrs, mask, num_splits, split_stride, BLOCK_TOKENS: tl.constexpr, BLOCK_RANK: tl.constexpr):
    """The sum over splits of what lies at ptrs [BLOCK_TOKENS, BLOCK_RANK], a split_stride apart."""
    inner = tl.zeros([BLOCK_TOKENS, BLOCK_RANK], tl.float32)
    for first in range(0, num_splits, SPLITS_AT_ONCE):
        splits = first + tl.arange(0, SPLITS_AT_ONCE)
        split_ptrs = ptrs[None, :, :] + splits[:, None, None] * split_stride
        are_there = (splits < num_splits)[:, None, None] & mask[None, :, :]
        inner += tl.sum(tl.load(split_ptrs, mask=are_there, other=0.0), axis=0)
    return inner


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def _expand_kernel(
    inner_ptr,
    by_slot_ptr,
    b_ptr,
    scales_ptr,
    blocks_ptr,
    y_ptr,
    num_tokens,
    num_slots,
    num_outputs,
    num_parts,
    rank,
    num_splits,
    IS_ONE_BLOCK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y += inner B^T, for a block of outputs of one part. With IS_ONE_BLOCK, B is there before inner; see above."""
    slot, first, stop = _block_of(by_slot_ptr, num_slots, tl.program_id(0), BLOCK_TOKENS, BLOCK_SLOTS)
    block_ptr = blocks_ptr + 3 * tl.program_id(1)
    part = tl.load(block_ptr)
    outputs = tl.load(block_ptr + 1) + tl.arange(0, BLOCK_OUTPUTS)
    stop = tl.where(tl.load(scales_ptr + slot * num_parts + part) == 0.0, first, stop)
    output_mask = outputs < tl.where(first < stop, tl.load(block_ptr + 2), 0)
    b_rows = slot.to(tl.int64) * num_outputs + outputs
    ranks = tl.arange(0, BLOCK_RANK)
    b_ptrs = b_ptr + b_rows[None, :] * rank + ranks[:, None]
    if IS_ONE_BLOCK:
        b = tl.load(b_ptrs, mask=(ranks < rank)[:, None] & output_mask[None, :], other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tokens, is_mine = _tokens_at(by_slot_ptr, num_slots, first, stop, BLOCK_TOKENS)
    y_ptrs = y_ptr + tokens[:, None] * num_outputs + outputs[None, :]
    mask = is_mine[:, None] & output_mask[None, :]
    y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    inner_ptrs = inner_ptr + (tokens * num_parts + part)[:, None] * rank + ranks[None, :]
    split_stride = num_tokens * num_parts * rank
    more = tl.zeros([BLOCK_TOKENS, BLOCK_OUTPUTS], tl.float32)
    for first_rank in range(0, BLOCK_RANK if IS_ONE_BLOCK else rank, BLOCK_RANK):
        rank_mask = first_rank + ranks < rank
        inner_mask = is_mine[:, None] & rank_mask[None, :]
        if IS_SPLIT:
            inner = _inner(inner_ptrs + first_rank, inner_mask, num_splits, split_stride, BLOCK_TOKENS, BLOCK_RANK)
        else:
            inner = tl.load(inner_ptrs + first_rank, mask=inner_mask, other=0.0)
        if not IS_ONE_BLOCK:
            b = tl.load(b_ptrs + first_rank, mask=rank_mask[:, None] & output_mask[None, :], other=0.0)
        more = tl.dot(inner.to(b.dtype), b, more, input_precision=PRECISION)
    tl.store(y_ptrs, (y + more).to(y_ptr.dtype.element_ty), mask=mask)


def add_adapters(
    x: torch.Tensor,
    y: torch.Tensor,
    by_slot: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scales: torch.Tensor,
    blocks: torch.Tensor,
    block_outputs: int,
) -> None:
    """y += scale * x A^T B^T in place, with the matrices of each token's slot, for each part of the outputs.

    Args:
        x: [num_tokens, num_columns], contiguous.
        y: [num_tokens, num_outputs], contiguous.
        by_slot: int32: for each slot the place of its first token in what follows, and the end of the last slot's; then
            tokens, sorted by slot. To tokens of no slot nothing is added.
        a: [num_slots, num_parts, rank, num_columns], contiguous.
        b: [num_slots, num_outputs, rank], contiguous.
        scales: float32 [num_slots, num_parts]; where it is 0 nothing is added.
        blocks: int32 [num_blocks, 3]: a part, an output of it, and the end of at most `block_outputs` from there on.
        block_outputs: a power of 2.
    """
    (num_tokens, num_columns), (num_slots, num_parts, rank, _) = x.shape, a.shape
    assert x.is_contiguous() and y.is_contiguous() and a.is_contiguous() and b.is_contiguous()
    assert a.shape[3] == num_columns and b.shape == (num_slots, y.shape[1], rank)
    if num_tokens == 0:
        return
    has_few_tokens = num_tokens <= FEW_TOKENS
    tile = FEW_TILE if has_few_tokens else LONG_TILE
    block_rows, block_rank = (min(MAX_RANKS, max(MIN_DOT, next_power_of_2(size))) for size in (num_parts * rank, rank))
    block_columns = min(MAX_COLUMNS, MAX_TILE_NUMBERS // block_rows) if has_few_tokens else LONG_COLUMNS
    block_columns = INTERPRETED_COLUMNS if is_interpreted() else block_columns * 2 // x.element_size()
    num_splits = min(MAX_SPLITS, triton.cdiv(num_columns, block_columns)) if has_few_tokens else 1
    split_columns = triton.cdiv(triton.cdiv(num_columns, num_splits), block_columns) * block_columns
    num_splits = triton.cdiv(num_columns, split_columns)
    inner = torch.empty((num_splits, num_tokens, num_parts, rank), dtype=torch.float32, device=x.device)
    early = can_launch_early(x.device)
    common = {
        "BLOCK_SLOTS": next_power_of_2(num_slots), "PRECISION": dot_precision(x.dtype), "EARLY": early,
        **({"launch_pdl": True} if early else {}),
    }  # fmt: skip
    num_blocks = min(num_tokens, triton.cdiv(num_tokens, tile.shrink_tokens) + num_slots)
    _shrink_kernel[(num_blocks, num_splits * triton.cdiv(num_parts * rank, block_rows))](
        x, by_slot, a, scales, inner, num_tokens, num_slots, num_columns, num_parts, rank, num_splits, split_columns,
        IS_ONE_BLOCK=split_columns == block_columns, BLOCK_TOKENS=tile.shrink_tokens, BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns, **common,
    )  # fmt: skip
    num_blocks = min(num_tokens, triton.cdiv(num_tokens, tile.expand_tokens) + num_slots)
    _expand_kernel[(num_blocks, len(blocks))](
        inner, by_slot, b, scales, blocks, y, num_tokens, num_slots, y.shape[1], num_parts, rank, num_splits,
        IS_ONE_BLOCK=rank <= block_rank, IS_SPLIT=num_splits > 1, BLOCK_TOKENS=tile.expand_tokens,
        BLOCK_RANK=block_rank, BLOCK_OUTPUTS=block_outputs, num_warps=tile.expand_warps, **common,
    )  # fmt: skip
