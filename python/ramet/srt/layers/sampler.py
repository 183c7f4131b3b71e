"""Owns the choice of the next tokens from logits, and the log-probabilities that are reported."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ramet.srt.batch.batch_plan import LogprobRows
from ramet.srt.layers.cpu_kernels import ops as cpu_ops
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.sampling.sampling_params import SamplingParams
from ramet.srt.utils.device import to_device

INVALID_TOKEN = -1  # what is sampled from a row that has no finite logit
_GREEDY_TEMPERATURE = 1e-6
_UNFILTERED = SamplingParams(temperature=1.0)
_MASK64 = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class SamplingInfo:
    """The sampling parameters of a batch as tensors."""

    seeds: np.ndarray  # uint64 [batch_size]
    is_greedy: torch.Tensor  # bool [batch_size]
    temperatures: torch.Tensor  # float32 [batch_size, 1]
    top_ps: torch.Tensor  # float32 [batch_size, 1]
    top_ks: torch.Tensor  # int64 [batch_size, 1]; the vocabulary size where there is no limit
    min_ps: torch.Tensor  # float32 [batch_size, 1]
    all_greedy: bool
    is_filtered: bool  # some row has a top_k, top_p or min_p
    max_top_k: int

    @classmethod
    def from_params(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], vocab_size: int, device: torch.device
    ) -> "SamplingInfo":
        greedy = [p.temperature < _GREEDY_TEMPERATURE or p.top_k == 1 for p in params]
        # A greedy row's token is the best one whatever is filtered: let it not ask for filters.
        drawn = [_UNFILTERED if is_greedy else p for p, is_greedy in zip(params, greedy, strict=True)]
        limits = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in drawn]
        return cls(
            seeds=np.array([seed & _MASK64 for seed in seeds], dtype=np.uint64),
            is_greedy=to_device(greedy, torch.bool, device),
            temperatures=_column([p.temperature for p in drawn], torch.float32, device),
            top_ps=_column([p.top_p for p in drawn], torch.float32, device),
            top_ks=_column(limits, torch.int64, device),
            min_ps=_column([p.min_p for p in drawn], torch.float32, device),
            all_greedy=all(greedy),
            is_filtered=min(limits) < vocab_size or any(p.top_p < 1 or p.min_p > 0 for p in drawn),
            max_top_k=max(limits),
        )


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return to_device(values, dtype, device).unsqueeze(1)


def sample(logits: torch.Tensor, info: SamplingInfo, uniforms: torch.Tensor | None) -> torch.Tensor:
    """Choose one token for each row.

    Args:
        logits: float32 [batch_size, vocab_size], after all logit rules.
        uniforms: float32 [batch_size], one number in [0, 1) for each row; none if all are greedy. A row's token
            depends on nothing else in the batch, so a seeded request gives the same tokens in any company.

    Returns:
        int64 [batch_size]; INVALID_TOKEN where a row has NaN or no finite logit.
    """
    if info.all_greedy and use_kernels(logits):
        from ramet.srt.layers.kernels.best_token import MAX_TILES, best_tokens

        if len(logits) <= MAX_TILES:
            return best_tokens(logits, INVALID_TOKEN)
    if cpu_ops.use_cpu_kernels(logits) and logits.dtype == torch.float32:
        if info.all_greedy:
            return cpu_ops.best_tokens(logits, INVALID_TOKEN)
        assert uniforms is not None
        rules = info.temperatures, info.top_ks, info.top_ps, info.min_ps
        return cpu_ops.sample(logits, info.is_greedy, uniforms, *rules, INVALID_TOKEN)
    best, tokens = logits.max(dim=-1)
    if not info.all_greedy:
        assert uniforms is not None
        drawn = _sample_inverse_cdf(logits / info.temperatures, info, uniforms, tokens)
        tokens = torch.where(info.is_greedy, tokens, drawn)
    return tokens.masked_fill(~torch.isfinite(best), INVALID_TOKEN)


def warm_up_sampling(logits: torch.Tensor) -> None:
    """Compile what the choice of tokens needs, and take the memory for as many rows."""
    params = SamplingParams(temperature=1.0, top_k=2, top_p=0.5, min_p=0.1)
    num_rows, vocab_size = logits.shape
    info = SamplingInfo.from_params([params] * num_rows, [0] * num_rows, vocab_size, logits.device)
    sample(logits, info, torch.zeros(num_rows, device=logits.device))
    greedy = [SamplingParams(temperature=0.0)] * num_rows
    sample(logits, SamplingInfo.from_params(greedy, [0] * num_rows, vocab_size, logits.device), None)


def _sample_inverse_cdf(
    scaled: torch.Tensor, info: SamplingInfo, uniforms: torch.Tensor, best: torch.Tensor
) -> torch.Tensor:
    """The first token, by id, at which the cumulated probability of the kept ones passes the uniform number.

    A GPU sums one row in parallel, so that the sum can grow by a rounding at a token that has no probability. Where it
    is just that one, the `best` token is taken.
    """
    probs = torch.softmax(scaled, dim=-1)
    if info.is_filtered:
        probs = probs.masked_fill(probs < _least_kept(probs, info), 0.0)
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # The product can round up to the total, beyond the last token that has any probability.
    targets = torch.minimum(uniforms.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, targets, right=True).clamp(max=probs.shape[1] - 1)  # NaN passes nothing
    return torch.where(probs.gather(1, tokens) > 0, tokens, best.unsqueeze(1)).squeeze(1)


def _least_kept(probs: torch.Tensor, info: SamplingInfo) -> torch.Tensor:
    """float32 [batch_size, 1]: the lowest probability that top_k, top_p and min_p keep. Equal ones stay together."""
    if use_kernels(probs):
        from ramet.srt.layers.kernels.sampling import least_kept

        return least_kept(probs, info.top_ks, info.top_ps, info.min_ps)
    return sort_least_kept(probs, info)


def sort_least_kept(probs: torch.Tensor, info: SamplingInfo) -> torch.Tensor:
    """What `_least_kept` gives, by sorting."""
    values = _largest(probs, info.max_top_k)
    cumulative = values.cumsum(dim=-1)
    ranks = torch.arange(values.shape[1], device=values.device)
    dropped = (ranks >= info.top_ks) | (values < info.min_ps * values[:, :1])
    # top_p is of the distribution that top_k leaves, as in transformers' warpers
    kept_total = cumulative.gather(1, info.top_ks.clamp(max=values.shape[1]) - 1)
    dropped |= (cumulative - values) > info.top_ps * kept_total
    num_kept = (~dropped).sum(dim=-1, keepdim=True).clamp(min=1)
    return values.gather(1, num_kept - 1)


def _largest(probs: torch.Tensor, num: int) -> torch.Tensor:
    """The `num` largest numbers of each row, falling."""
    if probs.is_cuda:
        if num < probs.shape[1]:
            return probs.topk(num, dim=-1).values
        return probs.sort(dim=-1, descending=True).values
    # NumPy sorts with vector instructions: a large vocabulary's row in a millisecond, where torch takes 15 to 60.
    return torch.from_numpy(np.sort(probs.numpy(), axis=-1)).flip(-1)[:, :num]


def uniforms_of(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float32, that depend on a request's seed and the token's place in its output alone.

    Two rounds of SplitMix64's finaliser (Steele, Lea and Flood, 2014).

    Args:
        seeds, positions: uint64 [batch_size].
    """
    state = seeds * _GOLDEN + positions + np.uint64(1)  # uint64 arithmetic wraps around, as it must
    for _ in range(2):
        state += _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return ((state >> np.uint64(40)) / float(1 << 24)).astype(np.float32)


@dataclass
class LogprobTensors:
    """Log-probabilities on the device, for `num_rows` rows."""

    chosen: torch.Tensor  # float32 [num_rows]: of the token of each row
    values: torch.Tensor  # float32 [num_rows, most]: of the likeliest tokens, falling
    token_ids: torch.Tensor  # int64 [num_rows, most]

    def to_rows(self, top_nums: Sequence[int]) -> LogprobRows:
        """On the host, with the `top_nums[i]` likeliest tokens of row i."""
        top = [row[:num] for row, num in zip(self.values.tolist(), top_nums, strict=True)]
        top_ids = [row[:num] for row, num in zip(self.token_ids.tolist(), top_nums, strict=True)]
        return LogprobRows(logprobs=self.chosen.tolist(), top_logprobs=top, top_token_ids=top_ids)


def compute_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, most: int) -> LogprobTensors:
    """Log-probabilities of `token_ids` [num_rows] and of the `most` likeliest tokens of each row.

    Args:
        logits: float32 [num_rows, vocab_size], as the model gave them.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids.clamp(min=0).unsqueeze(1)).squeeze(1)
    values, indices = torch.topk(logprobs, min(most, logits.shape[1]), dim=-1)
    return LogprobTensors(chosen, values, indices)


def compute_ranks(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """int64 [num_rows]: the places of `token_ids` [num_rows] in the vocabulary, 1 the likeliest; equals share the best.

    Args:
        logits: [num_rows, vocab_size]
    """
    return (logits > logits.gather(1, token_ids.unsqueeze(1))).sum(dim=-1) + 1
