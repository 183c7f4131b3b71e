"""Owns what adapters add to a linear layer's output, where each token of a pass may have another adapter or none.

Which tokens take a slot is read on the GPU alone, so that a CUDA graph can hold the launches. Each program is for one
slot, and goes through its tokens in blocks; of a long pass, several programs share them.
"""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early, dot_precision, is_interpreted, next_power_of_2

FEW_TOKENS = 256  # what is run before the first request has fewer and more
MAX_SPLITS = 32  # of the input's columns, each summed up by programs of its own
SPLITS_AT_ONCE = tl.constexpr(8)  # that are read of these sums
MIN_DOT, MAX_RANKS = 16, 64  # rows of A that one program takes: at least what a product needs
MAX_COLUMNS, MAX_TILE_NUMBERS = 512, 8192  # of A at a time


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
    num_columns,
    num_parts,
    rank,
    num_splits,
    split_columns,
    IS_ONE_BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """inner[split, token, part] = scale * x A^T for a block of ranks, summed over the split's columns of x.

    With IS_ONE_BLOCK a split has BLOCK_COLUMNS columns, and A is there before the wait for the kernel that makes
    x: slots change between passes alone.
    """
    slot, num_slots = tl.program_id(2), tl.num_programs(2)
    start, stop = tl.load(by_slot_ptr + slot), tl.load(by_slot_ptr + slot + 1)
    part = tl.program_id(1) % num_parts
    split = tl.program_id(1) // num_parts % num_splits
    first_rank = tl.program_id(1) // num_parts // num_splits * BLOCK_RANK
    scale = tl.load(scales_ptr + slot * num_parts + part)
    stop = tl.where(scale == 0.0, start, stop)
    ranks = first_rank + tl.arange(0, BLOCK_RANK)
    rank_mask = ranks < tl.where(start < stop, rank, 0)
    columns = split * split_columns + tl.arange(0, BLOCK_COLUMNS)
    a_rows = (slot * num_parts + part).to(tl.int64) * rank + ranks
    a_ptrs = a_ptr + a_rows[None, :] * num_columns + columns[:, None]
    end_column = tl.minimum((split + 1) * split_columns, num_columns)
    if IS_ONE_BLOCK:
        a = tl.load(a_ptrs, mask=rank_mask[None, :] & (columns < end_column)[:, None], other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for first in range(start + tl.program_id(0) * BLOCK_TOKENS, stop, tl.num_programs(0) * BLOCK_TOKENS):
        tokens, is_mine = _tokens_at(by_slot_ptr, num_slots, first, stop, BLOCK_TOKENS)
        x_ptrs = x_ptr + tokens[:, None] * num_columns + columns[None, :]
        acc = tl.zeros([BLOCK_TOKENS, BLOCK_RANK], tl.float32)
        if IS_ONE_BLOCK:
            x = tl.load(x_ptrs, mask=is_mine[:, None] & (columns < end_column)[None, :], other=0.0)
            acc = tl.dot(x, a, acc, input_precision=PRECISION)
        else:
            for column in range(0, end_column - split * split_columns, BLOCK_COLUMNS):
                column_mask = column + columns < end_column
                x = tl.load(x_ptrs + column, mask=is_mine[:, None] & column_mask[None, :], other=0.0)
                block = tl.load(a_ptrs + column, mask=rank_mask[None, :] & column_mask[:, None], other=0.0)
                acc = tl.dot(x, block, acc, input_precision=PRECISION)
        inner_rows = (split * num_tokens + tokens) * num_parts + part
        inner_ptrs = inner_ptr + inner_rows[:, None] * rank + ranks[None, :]
        tl.store(inner_ptrs, acc * scale, mask=is_mine[:, None] & rank_mask[None, :])


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
    num_outputs,
    num_parts,
    rank,
    num_splits,
    IS_ONE_BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y += inner B^T, for a block of outputs of one part. With IS_ONE_BLOCK, B is there before inner; see above."""
    slot, num_slots = tl.program_id(2), tl.num_programs(2)
    start, stop = tl.load(by_slot_ptr + slot), tl.load(by_slot_ptr + slot + 1)
    block_ptr = blocks_ptr + 3 * tl.program_id(1)
    part = tl.load(block_ptr)
    outputs = tl.load(block_ptr + 1) + tl.arange(0, BLOCK_OUTPUTS)
    stop = tl.where(tl.load(scales_ptr + slot * num_parts + part) == 0.0, start, stop)
    output_mask = outputs < tl.where(start < stop, tl.load(block_ptr + 2), 0)
    b_rows = slot.to(tl.int64) * num_outputs + outputs
    ranks = tl.arange(0, BLOCK_RANK)
    b_ptrs = b_ptr + b_rows[None, :] * rank + ranks[:, None]
    if IS_ONE_BLOCK:
        b = tl.load(b_ptrs, mask=(ranks < rank)[:, None] & output_mask[None, :], other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for first in range(start + tl.program_id(0) * BLOCK_TOKENS, stop, tl.num_programs(0) * BLOCK_TOKENS):
        tokens, is_mine = _tokens_at(by_slot_ptr, num_slots, first, stop, BLOCK_TOKENS)
        y_ptrs = y_ptr + tokens[:, None] * num_outputs + outputs[None, :]
        mask = is_mine[:, None] & output_mask[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        inner_ptrs = inner_ptr + (tokens * num_parts + part)[:, None] * rank + ranks[None, :]
        split_stride = num_tokens * num_parts * rank
        more = tl.zeros([BLOCK_TOKENS, BLOCK_OUTPUTS], tl.float32)
        if IS_ONE_BLOCK:
            inner_mask = is_mine[:, None] & (ranks < rank)[None, :]
            inner = _inner(inner_ptrs, inner_mask, num_splits, split_stride, BLOCK_TOKENS, BLOCK_RANK)
            more = tl.dot(inner.to(b.dtype), b, more, input_precision=PRECISION)
        else:
            for first_rank in range(0, rank, BLOCK_RANK):
                rank_mask = first_rank + ranks < rank
                inner_mask = is_mine[:, None] & rank_mask[None, :]
                inner_block = _inner(
                    inner_ptrs + first_rank, inner_mask, num_splits, split_stride, BLOCK_TOKENS, BLOCK_RANK
                )
                b_block = tl.load(b_ptrs + first_rank, mask=rank_mask[:, None] & output_mask[None, :], other=0.0)
                more = tl.dot(inner_block.to(b_block.dtype), b_block, more, input_precision=PRECISION)
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
    block_tokens = 16 if has_few_tokens else 64
    block_rank = min(MAX_RANKS, max(MIN_DOT, next_power_of_2(rank)))
    most_columns = MAX_COLUMNS if has_few_tokens else MAX_COLUMNS // 4  # of 64 tokens fewer fit
    block_columns = (
        32 if is_interpreted() else min(most_columns, MAX_TILE_NUMBERS // block_rank) * 2 // x.element_size()
    )
    num_splits = min(MAX_SPLITS, triton.cdiv(num_columns, block_columns)) if has_few_tokens else 1
    split_columns = triton.cdiv(triton.cdiv(num_columns, num_splits), block_columns) * block_columns
    num_splits = triton.cdiv(num_columns, split_columns)
    inner = torch.empty((num_splits, num_tokens, num_parts, rank), dtype=torch.float32, device=x.device)
    num_blocks = 1 if has_few_tokens else triton.cdiv(num_tokens, block_tokens)
    precision = dot_precision(x.dtype)
    early = can_launch_early(x.device)
    launch = {"EARLY": early, **({"launch_pdl": True} if early else {})}
    _shrink_kernel[(num_blocks, num_parts * num_splits * triton.cdiv(rank, block_rank), num_slots)](
        x,
        by_slot,
        a,
        scales,
        inner,
        num_tokens,
        num_columns,
        num_parts,
        rank,
        num_splits,
        split_columns,
        IS_ONE_BLOCK=split_columns == block_columns,
        BLOCK_TOKENS=block_tokens,
        BLOCK_RANK=block_rank,
        BLOCK_COLUMNS=block_columns,
        PRECISION=precision,
        **launch,
    )
    _expand_kernel[(num_blocks, len(blocks), num_slots)](
        inner,
        by_slot,
        b,
        scales,
        blocks,
        y,
        num_tokens,
        y.shape[1],
        num_parts,
        rank,
        num_splits,
        IS_ONE_BLOCK=rank <= block_rank,
        BLOCK_TOKENS=block_tokens,
        BLOCK_RANK=block_rank,
        BLOCK_OUTPUTS=block_outputs,
        PRECISION=precision,
        **launch,
    )
