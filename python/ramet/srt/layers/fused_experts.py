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

    Tokens are sorted by expert, so that each expert that has any takes one pair of matrix products.

    Args:
        x: [num_tokens, hidden_size].
        w13: [num_experts, 2 * size, hidden_size], the rows of W1 above those of W3.
        w2: [num_experts, hidden_size, size].
        weights: float32 [num_tokens, top_k].
        expert_ids: int64 [num_tokens, top_k]; those outside [0, num_experts) belong to another rank and add nothing.

    Returns:
        [num_tokens, hidden_size] in the type of x.
    """
    num_experts, top_k = w13.shape[0], expert_ids.shape[1]
    ids = expert_ids.flatten()
    ids = ids.masked_fill((ids < 0) | (ids >= num_experts), num_experts)
    order = ids.argsort(stable=True)
    tokens = order // top_k  # [num_tokens * top_k], the token of each assignment in the order of experts
    weights = weights.flatten()[order].unsqueeze(-1)
    counts = ids.bincount(minlength=num_experts + 1).tolist()
    y = torch.zeros_like(x, dtype=torch.float32)
    start = 0
    for expert, count in enumerate(counts[:num_experts]):
        if count == 0:
            continue
        rows = tokens[start : start + count]
        hidden = act_and_mul(F.linear(x[rows], w13[expert]), activation)
        y.index_add_(0, rows, F.linear(hidden, w2[expert]) * weights[start : start + count])
        start += count
    return y.to(x.dtype)
