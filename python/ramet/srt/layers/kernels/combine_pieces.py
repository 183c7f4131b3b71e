"""Owns the combination of attention's partial results, those of pieces of a token's keys, into what the token gets."""

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early, next_power_of_2

LOG2_E = 1.4426950408889634  # softmax runs in base 2: the scale of the scores is multiplied by it
LOG2 = tl.constexpr(LOG2_E)
BUSY_PROGRAMS = 2048  # small programs that are enough to fill a GPU


@triton.jit
def _combine_kernel(
    starts_ptr,
    partial_ptr,
    lse_ptr,
    sinks_ptr,
    out_ptr,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program sums the partial results of NUM_HEADS heads of one token, weighted by the sums of their weights."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_DIM)
    dim_mask = dims < HEAD_DIM
    first = tl.load(starts_ptr + token)
    end = tl.load(starts_ptr + token + 1)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if first == end:
        return
    for head in range(tl.program_id(1) * NUM_HEADS, (tl.program_id(1) + 1) * NUM_HEADS):
        maximum = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        acc = tl.zeros([BLOCK_DIM], tl.float32)
        for start in range(first, end, BLOCK_PARTS):
            parts = start + tl.arange(0, BLOCK_PARTS)
            valid = parts < end
            rows = parts.to(tl.int64) * num_heads + head
            lse = tl.load(lse_ptr + rows, mask=valid, other=float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(lse, axis=0))
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            weights = tl.exp2(lse - shift)
            correction = tl.exp2(maximum - shift)
            mask = (lse > float("-inf"))[:, None] & dim_mask[None, :]
            partial = tl.load(partial_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
            acc = acc * correction + tl.sum(partial * weights[:, None], axis=0)
            total = total * correction + tl.sum(weights, axis=0)
            maximum = new_maximum
        if HAS_SINKS:
            total += tl.exp2(tl.load(sinks_ptr + head).to(tl.float32) * LOG2 - maximum)
        out = acc / total
        out_ptrs = out_ptr + (token * num_heads + head) * HEAD_DIM + dims
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=dim_mask)


def combine(
    starts: torch.Tensor,
    partial: torch.Tensor,
    lse: torch.Tensor,
    out: torch.Tensor,
    group: int,
    sinks: torch.Tensor | None = None,
) -> None:
    """Write what comes of the partial results to the tokens of `out` that have some; see PieceLists."""
    num_tokens, num_heads, head_dim = out.shape
    early = can_launch_early(out.device)
    heads = 1 if num_tokens * num_heads <= BUSY_PROGRAMS else group
    _combine_kernel[(num_tokens, num_heads // heads)](
        starts,
        partial,
        lse,
        lse if sinks is None else sinks,
        out,
        num_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=max(16, next_power_of_2(head_dim)),
        NUM_HEADS=heads,
        BLOCK_PARTS=64 if head_dim <= 256 else 16,  # what fits into registers
        HAS_SINKS=sinks is not None,
        EARLY=early,
        num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )
