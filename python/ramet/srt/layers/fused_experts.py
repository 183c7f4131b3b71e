"""Owns the computation of stacked experts on one rank. Knows neither routing nor sharding."""

import torch

from ramet.srt.layers.activation import Activation, act_and_mul
from ramet.srt.layers.grouped_linear import grouped_linear


def fused_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    activation: Activation,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over each token's experts of weight * W2 (act(W1 x) * W3 x); the sum is taken in float32.

    Args:
        x: [num_tokens, hidden_size].
        w13: [num_experts, 2 * size, hidden_size], the rows of W1 above those of W3.
        w2: [num_experts, hidden_size, size].
        weights: float32 [num_tokens, top_k].
        expert_ids: int64 [num_tokens, top_k]; those outside [0, num_experts) belong to another rank and add nothing.
        w13_scale, w2_scale: float32 [num_experts, rows, 1] that multiply the rows of fp8 matrices.

    Returns:
        [num_tokens, hidden_size] in the type of x.
    """
    num_experts, (num_tokens, top_k) = w13.shape[0], expert_ids.shape
    if num_tokens == 0:
        return torch.zeros_like(x)
    ids = expert_ids.flatten()
    ids = ids.masked_fill((ids < 0) | (ids >= num_experts), num_experts)
    ids, order = ids.sort(stable=True)  # assignments of a token to an expert, those to the first expert first
    ends = torch.searchsorted(ids, torch.arange(num_experts, device=x.device), right=True, out_int32=True)
    hidden = act_and_mul(grouped_linear(x[order // top_k], w13, ends, w13_scale), activation)
    y = grouped_linear(hidden, w2, ends, w2_scale)
    is_computed = torch.arange(len(order), device=x.device) < ends[-1]
    y.masked_fill_(~is_computed.unsqueeze(-1), 0)
    parts = torch.empty_like(y).index_copy_(0, order, y).view(num_tokens, top_k, -1)
    total = torch.zeros_like(x, dtype=torch.float32)
    for place in range(top_k):
        total.addcmul_(parts[:, place], weights[:, place, None])
    return total.to(x.dtype)
