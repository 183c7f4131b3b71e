"""Owns the computation of stacked experts on one rank. Knows neither routing nor sharding."""

from typing import NamedTuple

import torch

from ramet.srt.configs.moe_config import ClampedGate
from ramet.srt.layers.activation import Activation, act_and_mul, clamped_gate
from ramet.srt.layers.fp8_matmul import activate_for
from ramet.srt.layers.grouped_linear import can_group, grouped_linear
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.matmul import multiply_row_by_experts, project, takes_experts_gemv
from ramet.srt.layers.quantization.stored import stored_linear, takes_stored
from ramet.srt.layers.quantization.weight import Weight

MOST_ROWS = 1024  # that are in memory at once for a CPU's products, where several experts have them


def needs_host(dtype: torch.dtype, w13: Weight, w2: Weight) -> bool:
    """Whether `fused_experts` of x in `dtype` waits for the experts' counts, so that no CUDA graph can hold it."""
    return not (can_group(dtype, w13) and can_group(dtype, w2))


class SharedOutput(NamedTuple):
    """What the expert that all tokens go through gives."""

    values: torch.Tensor  # [num_tokens, hidden_size]
    gate: torch.Tensor | None  # [num_tokens, 1]: its sigmoid multiplies the values

    def add_to(self, y: torch.Tensor) -> torch.Tensor:
        return y + (self.values if self.gate is None else self.gate.sigmoid() * self.values)


class BiasedGate(NamedTuple):
    """gpt-oss's way from the first product to the end: with biases, and a clamped gate of columns in turns."""

    clamp: ClampedGate
    w13_bias: torch.Tensor  # [num_experts, 2 * size]
    w2_bias: torch.Tensor | None  # [num_experts, hidden_size]; None: another rank adds it


Gate = Activation | BiasedGate


def fused_experts(
    x: torch.Tensor,
    w13: Weight,
    w2: Weight,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    gate: Gate,
    *,
    first_expert: int = 0,
    shared: SharedOutput | None = None,
) -> torch.Tensor:
    """Sum over each token's experts of weight * W2 (act(W1 x) * W3 x); the sum is taken in float32.

    Args:
        x: [num_tokens, hidden_size].
        w13: [num_experts, 2 * size, hidden_size], the rows of W1 above those of W3; with a BiasedGate, in turns.
        w2: [num_experts, hidden_size, size].
        weights: float32 [num_tokens, top_k].
        expert_ids: int64 or int32 [num_tokens, top_k]; those outside of num_experts from `first_expert` on belong to
            another rank and add nothing.
        shared: is added to the sum.

    Returns:
        [num_tokens, hidden_size] in the type of x.
    """
    if len(x) == 0:
        return torch.zeros_like(x)
    waits = needs_host(x.dtype, w13, w2)
    if use_kernels(x) and not waits:
        return _run_by_kernels(x, w13, w2, weights, expert_ids, gate, first_expert, shared)
    num_experts, (num_tokens, top_k) = w13.shape[0], expert_ids.shape
    ids = expert_ids.flatten() - first_expert
    ids = ids.masked_fill((ids < 0) | (ids >= num_experts), num_experts)
    ids, order = ids.sort(stable=True)  # assignments of a token to an expert, those to the first expert first
    experts = torch.arange(num_experts, dtype=ids.dtype, device=x.device)
    ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
    is_stored = waits and takes_stored(x, w13) and takes_stored(x, w2)
    run = _run_stored if is_stored else _run_in_turn if waits else _run_grouped
    parts = run(x, w13, w2, order, ends, top_k, gate).view(num_tokens, top_k, -1)
    total = torch.zeros_like(x, dtype=torch.float32)
    for place in range(top_k):
        total.addcmul_(parts[:, place], weights[:, place, None])
    y = total.to(x.dtype)
    return y if shared is None else shared.add_to(y)


def _run_by_kernels(
    x: torch.Tensor,
    w13: Weight,
    w2: Weight,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    gate: Gate,
    first_expert: int,
    shared: SharedOutput | None,
) -> torch.Tensor:
    """On a GPU: one or two launches before the products, and one after; for a single token, none before."""
    from ramet.srt.layers.kernels.activation import clamped_gate
    from ramet.srt.layers.kernels.expert_rows import OutputBias, combine_rows, lay_out_rows

    values, share = shared or (None, None)
    bias = None
    if isinstance(gate, BiasedGate) and gate.w2_bias is not None:
        bias = OutputBias(gate.w2_bias, expert_ids, first_expert)
    if all(takes_experts_gemv(x, weight, expert_ids.numel()) for weight in (w13, w2)):
        ids = expert_ids.flatten()
        gated = multiply_row_by_experts(x, w13, ids, first_expert, "" if isinstance(gate, BiasedGate) else gate.name)
        if isinstance(gate, BiasedGate):
            gated = clamped_gate(gated, gate.w13_bias, None, gate.clamp, ids, first_expert)
        y = multiply_row_by_experts(gated, w2, ids, first_expert)
        return combine_rows(y, None, None, weights, values, share, bias)

    rows, places, ends = lay_out_rows(x, expert_ids, w13.shape[0], first_expert)
    hidden = grouped_linear(rows, w13, ends)
    if isinstance(gate, BiasedGate):
        gated = clamped_gate(hidden, gate.w13_bias, ends, gate.clamp)
        return combine_rows(grouped_linear(gated, w2, ends), places, ends, weights, values, share, bias)
    gated_rows = activate_for(hidden, gate, w2)
    return combine_rows(grouped_linear(gated_rows, w2, ends), places, ends, weights, values, share)


def _run_in_turn(
    x: torch.Tensor,
    w13: Weight,
    w2: Weight,
    order: torch.Tensor,
    ends: torch.Tensor,
    top_k: int,
    gate: Gate,
) -> torch.Tensor:
    """Each assignment's output, zeros for those of other ranks: expert by expert, with the rows of one in memory.

    Args:
        order: int64 [num_assignments], sorted by expert; the token of an assignment is its number // top_k.
        ends: int32 [num_experts], where each expert's assignments end in `order`. What follows is not computed.

    Returns:
        [num_assignments, hidden_size] in the type of x.
    """
    parts = x.new_zeros(len(order), x.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if start < end:
            places = order[start:end]
            hidden = _activate(project(x[places // top_k], w13[expert]), gate, expert)
            parts[places] = _add_bias(project(hidden, w2[expert]), gate, expert)
            start = end
    return parts


def _run_stored(
    x: torch.Tensor,
    w13: Weight,
    w2: Weight,
    order: torch.Tensor,
    ends: torch.Tensor,
    top_k: int,
    gate: Gate,
) -> torch.Tensor:
    """The same on a CPU, with experts of few rows by one call for each product: threads take parts of all of them."""
    parts = x.new_zeros(len(order), x.shape[1])
    start = 0
    for stop in _run_ends(ends.tolist()):
        places = order[start:stop]
        run_ends = ends.clamp(start, stop) - start  # of the others, no row
        experts: int | torch.Tensor = 0
        if isinstance(gate, BiasedGate):
            experts = torch.searchsorted(run_ends, torch.arange(stop - start, dtype=ends.dtype), right=True)
        hidden = _activate(stored_linear(x[places // top_k], w13, ends=run_ends), gate, experts)
        parts[places] = _add_bias(stored_linear(hidden, w2, ends=run_ends), gate, experts)
        start = stop
    return parts


def _run_ends(ends: list[int]) -> list[int]:
    """Where runs of experts end that have MOST_ROWS rows together, or one expert's if those are more."""
    result: list[int] = []
    start = 0
    for end, next_end in zip(ends, [*ends[1:], None], strict=True):
        if end > start and (next_end is None or next_end - start > MOST_ROWS):
            result.append(end)
            start = end
    return result


def _run_grouped(
    x: torch.Tensor,
    w13: Weight,
    w2: Weight,
    order: torch.Tensor,
    ends: torch.Tensor,
    top_k: int,
    gate: Gate,
) -> torch.Tensor:
    """The same with all experts in one product, whatever their counts; takes more memory on the way."""
    numbers = torch.arange(len(order), dtype=ends.dtype, device=x.device)
    experts = torch.searchsorted(ends, numbers, right=True).clamp_(max=len(ends) - 1)
    hidden = _activate(grouped_linear(x[order // top_k], w13, ends), gate, experts)
    y = _add_bias(grouped_linear(hidden, w2, ends), gate, experts)
    is_computed = numbers < ends[-1]
    y.masked_fill_(~is_computed.unsqueeze(-1), 0)
    return torch.empty_like(y).index_copy_(0, order, y)


def _activate(y: torch.Tensor, gate: Gate, experts: int | torch.Tensor) -> torch.Tensor:
    """What goes into the second product, of rows [num_rows, 2 * size] of the first, which are of these experts."""
    if isinstance(gate, BiasedGate):
        return clamped_gate(y + gate.w13_bias[experts], gate.clamp)
    return act_and_mul(y, gate)


def _add_bias(y: torch.Tensor, gate: Gate, experts: int | torch.Tensor) -> torch.Tensor:
    return y + gate.w2_bias[experts] if isinstance(gate, BiasedGate) and gate.w2_bias is not None else y
