"""Owns the gated delta rule and the convolution before it in plain torch: what the kernels must give.

A head keeps a matrix S [key_dim, value_dim]. Each token forgets a part of it and writes what its key does not give yet
(Yang, Kautz and Hatamizadeh, 2024): S <- exp(g) S, then S <- S + k (beta (v - S^T k))^T; it reads S^T q.
"""

import torch
import torch.nn.functional as F

from ramet.srt.batch.delta_pass import CHUNK

NORM_EPS = 1e-6  # of queries and keys


def causal_conv(x: torch.Tensor, weight: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu of each channel's convolution over a sequence.

    Args:
        x: [num_tokens, num_channels].
        weight: [num_channels, kernel_size], the newest token's last.
        before: [kernel_size - 1, num_channels]: the inputs before these.

    Returns:
        [num_tokens, num_channels], and the inputs that go before the next token.
    """
    num_tokens = len(x)
    inputs = torch.cat((before, x))
    taps = weight.float().t()
    total = sum(inputs[place : place + num_tokens].float() * tap for place, tap in enumerate(taps))
    assert isinstance(total, torch.Tensor)
    return F.silu(total).to(x.dtype), inputs[num_tokens:]


def normed(q: torch.Tensor, k: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [..., key heads, key_dim] of length 1, the queries divided by sqrt(key_dim), for value heads.

    Returns:
        Both float32 [..., num_heads, key_dim].
    """
    repeats = num_heads // q.shape[-2]
    q, k = (part.float() for part in (q, k))
    q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + NORM_EPS) * q.shape[-1] ** -0.5
    k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + NORM_EPS)
    return q.repeat_interleave(repeats, dim=-2), k.repeat_interleave(repeats, dim=-2)


def delta_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each of several sequences.

    Args:
        q, k: [num_sequences, key heads, key_dim].
        v: [num_sequences, num_heads, value_dim].
        g, beta: float32 [num_sequences, num_heads].
        state: float32 [num_sequences, num_heads, key_dim, value_dim].

    Returns:
        [num_sequences, num_heads, value_dim] like v, and the states after.
    """
    q, k = normed(q, k, v.shape[-2])
    state = state * g.exp()[..., None, None]
    written = beta.unsqueeze(-1) * (v.float() - torch.einsum("bhkv,bhk->bhv", state, k))
    state = state + k.unsqueeze(-1) * written.unsqueeze(-2)
    return torch.einsum("bhkv,bhk->bhv", state, q).to(v.dtype), state


def delta_chunks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of one sequence, CHUNK of them at a time (Yang et al., 2024, section 3.3).

    What the tokens of a chunk write depends on each other by a triangular system, which is solved for all at once.

    Args:
        q, k: [num_tokens, key heads, key_dim].
        v: [num_tokens, num_heads, value_dim].
        g, beta: float32 [num_tokens, num_heads].
        state: float32 [num_heads, key_dim, value_dim], before them.

    Returns:
        [num_tokens, num_heads, value_dim] like v, and the state after.
    """
    queries, keys = normed(q, k, v.shape[-2])
    parts = [part.transpose(0, 1) for part in (queries, keys, v.float(), g, beta)]  # by head
    outputs = []
    for start in range(0, len(v), CHUNK):
        q, k, v_, g_, beta_ = (part[:, start : start + CHUNK] for part in parts)
        output, state = _chunk(q, k, v_, g_, beta_, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1).transpose(0, 1).to(v.dtype), state


def _chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk, all [num_heads, length, ...]."""
    length = g.shape[1]
    total = g.cumsum(1)
    seen = torch.ones(length, length, dtype=torch.bool, device=g.device).tril()
    kept = (
        (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~seen, -torch.inf).exp()
    )  # of what j has written at i
    overlap = beta.unsqueeze(-1) * kept * (k @ k.transpose(1, 2))
    system = torch.eye(length, device=g.device) + overlap.tril(-1)
    wanted = beta.unsqueeze(-1) * (v - total.exp().unsqueeze(-1) * (k @ state))
    written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    output = (q * total.exp().unsqueeze(-1)) @ state + (q @ k.transpose(1, 2) * kept) @ written
    last = total[:, -1:]
    state = state * last.exp().unsqueeze(-1) + (k * (last - total).exp().unsqueeze(-1)).transpose(1, 2) @ written
    return output, state
