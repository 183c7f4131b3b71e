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
    num_experts, (num_tokens, top_k) = w13.shape[0], expert_ids.shape
    ids = expert_ids.flatten()
    ids = ids.masked_fill((ids < 0) | (ids >= num_experts), num_experts)
    order = ids.argsort(stable=True)  # [num_tokens * top_k]: assignments, those of the first expert first
    tokens = order // top_k
    counts = ids.bincount(minlength=num_experts + 1).tolist()
    parts = x.new_zeros(num_tokens, top_k, x.shape[1])
    flat_parts = parts.flatten(0, 1)
    start = 0
    for expert, count in enumerate(counts[:num_experts]):
        if count:
            chosen = slice(start, start + count)
            hidden = act_and_mul(F.linear(x[tokens[chosen]], w13[expert]), activation)
            flat_parts[order[chosen]] = F.linear(hidden, w2[expert])
            start += count
    return _weighted_sum(parts, weights).to(x.dtype)


def _weighted_sum(parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[num_tokens, top_k, hidden_size] and float32 [num_tokens, top_k] -> float32 [num_tokens, hidden_size]."""
    total = torch.zeros_like(parts[:, 0], dtype=torch.float32)
    for place in range(weights.shape[1]):
        total.addcmul_(parts[:, place], weights[:, place, None])
    return total
