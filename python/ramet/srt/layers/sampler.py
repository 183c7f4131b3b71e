"""Owns the choice of the next tokens from logits, and the log-probabilities that are reported."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ramet.srt.model_executor.batch_plan import LogprobRows
from ramet.srt.sampling.sampling_params import SamplingParams

INVALID_TOKEN = -1  # what is sampled from a row that has no finite logit
_GREEDY_TEMPERATURE = 1e-6
_MASK64 = (1 << 64) - 1


@dataclass
class SamplingInfo:
    """The sampling parameters of a batch as tensors; rows that are greedy have top_k 1."""

    temperatures: torch.Tensor  # float32 [batch_size, 1]
    top_ps: torch.Tensor  # float32 [batch_size, 1]
    top_ks: torch.Tensor  # int64 [batch_size, 1]; the vocabulary size where there is no limit
    min_ps: torch.Tensor  # float32 [batch_size, 1]
    all_greedy: bool
    is_filtered: bool  # some row has a top_k, top_p or min_p
    max_top_k: int

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> "SamplingInfo":
        greedy = [p.temperature < _GREEDY_TEMPERATURE or p.top_k == 1 for p in params]
        top_ks = [
            1 if is_greedy else (vocab_size if p.top_k < 1 else min(p.top_k, vocab_size))
            for p, is_greedy in zip(params, greedy, strict=True)
        ]

        def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        return cls(
            temperatures=column(
                [1.0 if g else p.temperature for p, g in zip(params, greedy, strict=True)], torch.float32
            ),
            top_ps=column([p.top_p for p in params], torch.float32),
            top_ks=column(top_ks, torch.int64),
            min_ps=column([p.min_p for p in params], torch.float32),
            all_greedy=all(greedy),
            is_filtered=any(k < vocab_size or p.top_p < 1 or p.min_p > 0 for k, p in zip(top_ks, params, strict=True)),
            max_top_k=max(top_ks),
        )


def sample(logits: torch.Tensor, info: SamplingInfo, uniforms: torch.Tensor) -> torch.Tensor:
    """Choose one token for each row.

    Args:
        logits: float32 [batch_size, vocab_size], after all logit rules.
        uniforms: float32 [batch_size], one number in [0, 1) for each row. A row's token depends on nothing else in
            the batch, so a seeded request gives the same tokens in any company.

    Returns:
        int64 [batch_size]; INVALID_TOKEN where a row has NaN or no finite logit.
    """
    best, tokens = logits.max(dim=-1)
    if not info.all_greedy:
        tokens = _sample_inverse_cdf(logits / info.temperatures, info, uniforms)
    return tokens.masked_fill(~torch.isfinite(best), INVALID_TOKEN)


def _sample_inverse_cdf(scaled: torch.Tensor, info: SamplingInfo, uniforms: torch.Tensor) -> torch.Tensor:
    """The first token, by falling probability, at which the cumulated kept probability passes the uniform number."""
    probs = torch.softmax(scaled, dim=-1)
    if not info.is_filtered:
        cumulative = probs.cumsum(dim=-1)
        targets = uniforms.unsqueeze(1) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, targets, right=True).clamp(max=probs.shape[1] - 1).squeeze(1)
    values, indices = torch.topk(probs, info.max_top_k, dim=-1)
    cumulative = values.cumsum(dim=-1)
    ranks = torch.arange(values.shape[1], device=values.device)
    dropped = (ranks >= info.top_ks) | (values < info.min_ps * values[:, :1])
    # top_p is of the distribution that top_k leaves, as in transformers' warpers
    kept_total = cumulative.gather(1, info.top_ks.clamp(max=values.shape[1]) - 1)
    dropped |= (cumulative - values) > info.top_ps * kept_total
    dropped[:, 0] = False
    cumulative = values.masked_fill(dropped, 0.0).cumsum(dim=-1)
    targets = uniforms.unsqueeze(1) * cumulative[:, -1:]
    picks = torch.searchsorted(cumulative, targets, right=True).clamp(max=values.shape[1] - 1)
    return indices.gather(1, picks).squeeze(1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the request's seed and the token's place in its output.

    Two rounds of SplitMix64's finaliser (Steele, Lea and Flood, 2014).
    """
    state = (seed * 0x9E3779B97F4A7C15 + position + 1) & _MASK64
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return (state >> 40) / (1 << 24)


def compute_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, top_nums: Sequence[int]) -> LogprobRows:
    """Log-probabilities of `token_ids` [num_rows] and of the `top_nums[i]` likeliest tokens of each row.

    Args:
        logits: float32 [num_rows, vocab_size], as the model gave them.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids.clamp(min=0).unsqueeze(1)).squeeze(1).tolist()
    most = min(max(top_nums, default=0), logits.shape[1])
    if most == 0:
        return LogprobRows(logprobs=chosen, top_logprobs=[[] for _ in chosen], top_token_ids=[[] for _ in chosen])
    values, indices = torch.topk(logprobs, most, dim=-1)
    top = [row[:num] for row, num in zip(values.tolist(), top_nums, strict=True)]
    top_ids = [row[:num] for row, num in zip(indices.tolist(), top_nums, strict=True)]
    return LogprobRows(logprobs=chosen, top_logprobs=top, top_token_ids=top_ids)
