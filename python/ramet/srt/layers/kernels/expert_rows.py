"""Owns the kernels around the experts' products: rows laid out by expert before, and summed up by token after.

How many rows an expert has is read on the GPU alone, so that a CUDA graph can hold the launches.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ramet.srt.layers.kernels.runtime import can_launch_early

FEW_TOKENS = 128  # which one launch lays out, each program counting for itself; more take two
FEW_ASSIGNMENTS = 1024
BLOCK_ASSIGNMENTS = 1024
BLOCK_COLUMNS = 1024


@triton.jit
def _load_keys(ids_ptr, numbers, num_assignments, first_expert, num_experts):
    """The local expert of each assignment; num_experts for those of other ranks, and beyond the last."""
    keys = tl.load(ids_ptr + numbers, mask=numbers < num_assignments, other=-1).to(tl.int32) - first_expert
    return tl.where((numbers < num_assignments) & (keys >= 0) & (keys < num_experts), keys, num_experts)


# Passes of many sizes are captured: none may find that its size needs a kernel of its own.
@triton.jit(do_not_specialize=["num_assignments", "first_expert"])
def _lay_out_few_kernel(
    x_ptr,
    ids_ptr,
    rows_ptr,
    places_ptr,
    ends_ptr,
    num_assignments,
    first_expert,
    num_experts,
    x_stride,
    size,
    TOP_K: tl.constexpr,
    BLOCK_ASSIGNMENTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program copies BLOCK_COLUMNS of one assignment's row to its place, and has one expert's end.

    An assignment's place is the number of those to experts before its own, and of earlier ones to the same.
    """
    mine = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    numbers = tl.arange(0, BLOCK_ASSIGNMENTS)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    keys = _load_keys(ids_ptr, numbers, num_assignments, first_expert, num_experts)
    my_key = _load_keys(ids_ptr, mine, num_assignments, first_expert, num_experts)
    mask = columns < tl.where(my_key < num_experts, size, 0)
    x = tl.load(x_ptr + (mine // TOP_K).to(tl.int64) * x_stride + columns, mask=mask, other=0.0)
    if (mine < num_experts) & (tl.program_id(1) == 0):
        tl.store(ends_ptr + mine, tl.sum((keys <= mine).to(tl.int32), axis=0))
    if mine < num_assignments:
        is_before = (keys < my_key) | ((keys == my_key) & (numbers < mine))
        place = tl.sum(is_before.to(tl.int32), axis=0)
        tl.store(rows_ptr + place.to(tl.int64) * size + columns, x, mask=mask)
        if tl.program_id(1) == 0:
            tl.store(places_ptr + mine, place)


@triton.jit(do_not_specialize=["num_assignments", "first_expert"])
def _find_places_kernel(
    ids_ptr,
    places_ptr,
    ends_ptr,
    num_assignments,
    first_expert,
    num_experts,
    BLOCK_ASSIGNMENTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program finds the places of one expert's assignments; one more, those of other ranks behind all."""
    expert = tl.program_id(0)
    numbers = tl.arange(0, BLOCK_ASSIGNMENTS)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    num_before = tl.zeros([BLOCK_ASSIGNMENTS], tl.int32)
    for first in range(0, num_assignments, BLOCK_ASSIGNMENTS):
        keys = _load_keys(ids_ptr, first + numbers, num_assignments, first_expert, num_experts)
        num_before += (keys < expert).to(tl.int32)
    end = tl.sum(num_before, axis=0)
    for first in range(0, num_assignments, BLOCK_ASSIGNMENTS):
        keys = _load_keys(ids_ptr, first + numbers, num_assignments, first_expert, num_experts)
        is_mine = (keys == expert) & (first + numbers < num_assignments)
        places = end + tl.cumsum(is_mine.to(tl.int32), axis=0) - 1
        tl.store(places_ptr + first + numbers, places, mask=is_mine)
        end += tl.sum(is_mine.to(tl.int32), axis=0)
    if expert < num_experts:
        tl.store(ends_ptr + expert, end)


@triton.jit
def _spread_kernel(
    x_ptr,
    places_ptr,
    ends_ptr,
    rows_ptr,
    num_experts,
    x_stride,
    size,
    TOP_K: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program copies BLOCK_COLUMNS of one token's row to all of its places that are of an expert here."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    end = tl.load(ends_ptr + num_experts - 1)
    x = tl.load(x_ptr + token * x_stride + columns, mask=columns < size, other=0.0)
    for choice in tl.static_range(TOP_K):
        place = tl.load(places_ptr + token * TOP_K + choice)
        tl.store(rows_ptr + place.to(tl.int64) * size + columns, x, mask=columns < tl.where(place < end, size, 0))


def lay_out_rows(
    x: torch.Tensor, ids: torch.Tensor, num_experts: int, first_expert: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of x once for each expert that their token goes to, sorted by expert, then by token and choice.

    Args:
        x: [num_tokens, size]; rows may be apart.
        ids: contiguous integers [num_tokens, top_k]; those outside of `num_experts` from `first_expert` on are of other
            ranks, and have no row.

    Returns:
        Rows [num_tokens * top_k, size] in the type of x, of which those of no expert here hold anything; `places` int32
        [num_tokens, top_k], the row of each assignment, for those of other ranks one behind all that are computed; and
        `ends` int32 [num_experts], where each expert's rows end.
    """
    (num_tokens, top_k), size = ids.shape, x.shape[1]
    assert len(x) == num_tokens and x.stride(1) == 1 and ids.is_contiguous()
    rows = torch.empty((ids.numel(), size), dtype=x.dtype, device=x.device)
    places = torch.empty((num_tokens, top_k), dtype=torch.int32, device=x.device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=x.device)
    early = can_launch_early(x.device)
    launch = {"EARLY": early, **({"launch_pdl": True} if early else {})}
    num_blocks = triton.cdiv(size, BLOCK_COLUMNS)
    if num_tokens <= FEW_TOKENS and ids.numel() <= FEW_ASSIGNMENTS:
        _lay_out_few_kernel[(max(ids.numel(), num_experts), num_blocks)](
            x, ids, rows, places, ends, ids.numel(), first_expert, num_experts, x.stride(0), size,
            TOP_K=top_k, BLOCK_ASSIGNMENTS=FEW_ASSIGNMENTS, BLOCK_COLUMNS=BLOCK_COLUMNS, **launch,
        )  # fmt: skip
        return rows, places, ends
    _find_places_kernel[(num_experts + 1,)](
        ids, places, ends, ids.numel(), first_expert, num_experts, BLOCK_ASSIGNMENTS=BLOCK_ASSIGNMENTS, **launch
    )
    _spread_kernel[(num_tokens, num_blocks)](
        x, places, ends, rows, num_experts, x.stride(0), size, TOP_K=top_k, BLOCK_COLUMNS=BLOCK_COLUMNS, **launch
    )
    return rows, places, ends


class OutputBias(NamedTuple):
    """What each expert adds to its rows before they are weighted."""

    values: torch.Tensor  # contiguous [num_experts, size]
    ids: torch.Tensor  # contiguous integers [num_tokens, top_k]: as for `lay_out_rows`
    first_expert: int


@triton.jit
def _combine_kernel(
    y_ptr,
    places_ptr,
    ends_ptr,
    weights_ptr,
    shared_ptr,
    gate_ptr,
    bias_ptr,
    ids_ptr,
    out_ptr,
    first_expert,
    num_experts,
    shared_stride,
    size,
    TOP_K: tl.constexpr,
    IN_ORDER: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program sums up BLOCK_COLUMNS of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = columns < size
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    end = num_experts
    if not IN_ORDER:
        end = tl.load(ends_ptr + num_experts - 1)
    total = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for choice in tl.static_range(TOP_K):
        place = token * TOP_K + choice
        weight = tl.load(weights_ptr + place)
        if IN_ORDER:
            y = tl.load(y_ptr + place * size + columns, mask=mask, other=0.0)
        else:
            place = tl.load(places_ptr + place).to(tl.int64)
            y = tl.load(y_ptr + place * size + columns, mask=columns < tl.where(place < end, size, 0), other=0.0)
        if HAS_BIAS:
            expert = tl.load(ids_ptr + token * TOP_K + choice).to(tl.int64) - first_expert
            is_here = (expert >= 0) & (expert < num_experts)
            bias_mask = columns < tl.where(is_here, size, 0)
            y = y.to(tl.float32) + tl.load(bias_ptr + expert * size + columns, mask=bias_mask, other=0.0)
        total = tl.fma(y.to(tl.float32), weight, total)  # as torch's addcmul rounds on a GPU
    if HAS_SHARED:
        shared = tl.load(shared_ptr + token * shared_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_GATE:
            shared *= 1.0 / (1.0 + tl.exp(-tl.load(gate_ptr + token).to(tl.float32)))
        total += shared
    tl.store(out_ptr + token * size + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine_rows(
    y: torch.Tensor,
    places: torch.Tensor | None,
    ends: torch.Tensor | None,
    weights: torch.Tensor,
    shared: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    bias: OutputBias | None = None,
) -> torch.Tensor:
    """Sum over a token's experts of weight * y, plus what all tokens take; in float32, one choice after the other.

    Args:
        y: contiguous [num_tokens * top_k, size], as `lay_out_rows` lays them out; rows of no expert may be NaN.
        places, ends: of `lay_out_rows`; None where y has the assignments' rows in their own order.
        weights: contiguous float32 [num_tokens, top_k].
        shared: [num_tokens, size]; rows may be apart.
        gate: contiguous [num_tokens, 1], whose sigmoid multiplies `shared`.

    Returns:
        [num_tokens, size] in the type of y.
    """
    (num_tokens, top_k), size = weights.shape, y.shape[1]
    assert y.is_contiguous() and weights.is_contiguous() and weights.dtype == torch.float32
    assert shared is None or (shared.shape == (num_tokens, size) and shared.stride(1) == 1)
    assert gate is None or (gate.shape == (num_tokens, 1) and gate.is_contiguous())
    assert bias is None or (bias.values.shape[1] == size and bias.ids.is_contiguous())
    assert bias is None or ends is None or len(ends) == len(bias.values)
    num_experts = len(ends) if ends is not None else 0 if bias is None else len(bias.values)
    out = torch.empty((num_tokens, size), dtype=y.dtype, device=y.device)
    early = can_launch_early(y.device)
    _combine_kernel[(num_tokens, triton.cdiv(size, BLOCK_COLUMNS))](
        y,
        y if places is None else places,
        y if ends is None else ends,
        weights,
        y if shared is None else shared,
        y if gate is None else gate,
        y if bias is None else bias.values,
        weights if bias is None else bias.ids,
        out,
        0 if bias is None else bias.first_expert,
        num_experts,
        0 if shared is None else shared.stride(0),
        size,
        TOP_K=top_k,
        IN_ORDER=places is None,
        HAS_SHARED=shared is not None,
        HAS_GATE=gate is not None,
        HAS_BIAS=bias is not None,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        EARLY=early,
        **({"launch_pdl": True} if early else {}),
    )
    return out
