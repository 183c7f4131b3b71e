"""Owns the computation of stacked experts on one rank. Knows neither routing nor sharding."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ramet.srt.layers.activation import act_and_mul


def fused_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Sum over each token's experts of weight * W2 (act(W1 x) * W3 x); the sum is taken in float32.

    Args:
        x: [num_tokens, hidden_size].
        w13: [num_experts, 2 * size, hidden_size], the rows of W1 above those of W3.
        w2: [num_experts, hidden_size, size].
        weights: float32 [num_tokens, top_k].
        expert_ids: int64 [num_tokens, top_k]; those outside [0, num_experts) belong to another rank and add nothing.

    Returns:
        [num_tokens, hidden_size] in the type of x.
    """
    num_experts, (num_tokens, top_k) = w13.shape[0], expert_ids.shape
    if num_tokens == 0:
        return torch.zeros_like(x)
    ids = expert_ids.flatten()
    ids = ids.masked_fill((ids < 0) | (ids >= num_experts), num_experts)
    ids, order = ids.sort(stable=True)  # assignments of a token to an expert, those to the first expert first
    ends = torch.searchsorted(ids, torch.arange(num_experts, device=x.device), right=True)
    parts = x.new_zeros(num_tokens, top_k, x.shape[1])
    run_experts = run_experts_grouped if _can_group(x, w2) else run_experts_in_turn
    run_experts(x, w13, w2, activation, order // top_k, order, ends, parts.flatten(0, 1))
    total = torch.zeros_like(x, dtype=torch.float32)
    for place in range(top_k):
        total.addcmul_(parts[:, place], weights[:, place, None])
    return total.to(x.dtype)


def _can_group(x: torch.Tensor, w2: torch.Tensor) -> bool:
    """Whether the GPU's grouped product takes these shapes: it needs rows of whole 16 bytes."""
    return x.is_cuda and all(extent * x.element_size() % 16 == 0 for extent in w2.shape[1:])


def run_experts_in_turn(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Each expert's output for its tokens: one pair of matrix products for every expert that has any.

    Args:
        tokens: int64 [num_assignments], the token of each assignment, sorted by expert.
        order: int64 [num_assignments], the row of `out` for it.
        ends: int64 [num_experts], where each expert's run ends. What follows the last is not computed.
        out: [num_assignments, hidden_size], zeros.
    """
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if start < end:
            hidden = act_and_mul(F.linear(x[tokens[start:end]], w13[expert]), activation)
            out[order[start:end]] = F.linear(hidden, w2[expert])
            start = end


def run_experts_grouped(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """The same without the counts on the host, so that a CUDA graph can hold it; takes more memory on the way."""
    offsets = ends.int()
    hidden = act_and_mul(F.grouped_mm(x[tokens], w13.transpose(1, 2), offs=offsets), activation)
    y = F.grouped_mm(hidden, w2.transpose(1, 2), offs=offsets)
    is_computed = torch.arange(len(tokens), device=x.device) < ends[-1]  # the other rows hold anything, NaN too
    out.index_copy_(0, order, y.masked_fill_(~is_computed.unsqueeze(-1), 0))
