"""Owns the rules that change one request's logits before sampling: penalties, biases, banned and allowed tokens."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ramet.srt.sampling.sampling_state import SamplingState
from ramet.srt.utils.device import to_device


class SamplingRow:
    """One request's sampling state on the rank that samples, with what its penalties have counted."""

    def __init__(self, state: SamplingState):
        self.state = state
        self.num_output_tokens = len(state.output_ids)
        self.token_counts: torch.Tensor | None = None  # float32 [vocab_size]: output tokens
        self.seen_tokens: torch.Tensor | None = None  # bool [vocab_size]: prompt and output tokens
        self.banned_tokens: torch.Tensor | None = None  # bool [vocab_size]: never to be chosen
        self.bad_words = BadWords(state) if state.bad_words_ids else None

    def append(self, token: torch.Tensor) -> None:
        """Count a new output token, int64 [1] and not negative, where it lies: on the device."""
        self.num_output_tokens += 1
        if self.token_counts is not None:
            self.token_counts.index_add_(0, token, torch.ones(1, dtype=torch.float32, device=token.device))
        if self.seen_tokens is not None:
            self.seen_tokens.index_fill_(0, token, True)
        if self.bad_words is not None:
            self.bad_words.append(token)


class BadWords:
    """A request's bad words of several tokens, and the output tokens by which one of them may have begun."""

    def __init__(self, state: SamplingState):
        self.single_ids = [ids[0] for ids in state.bad_words_ids if len(ids) == 1]
        self._several = [ids for ids in state.bad_words_ids if len(ids) > 1]
        self._num_kept = max((len(ids) - 1 for ids in self._several), default=0)
        self._last: list[torch.Tensor] = []  # int64 [1] each, where it lies: on the device
        self._first_ids = state.output_ids[-self._num_kept :] if self._num_kept else []  # of an output that is resumed
        self._words: list[torch.Tensor] | None = None  # int64 [len(word)] each

    def append(self, token: torch.Tensor) -> None:
        """Take in a new output token, int64 [1]."""
        if self._num_kept:
            self._last = [*self._last, token.clone()][-self._num_kept :]

    def ban(self, logits: torch.Tensor) -> None:
        """Ban in `logits` [vocab_size] the tokens that would end a word which has begun."""
        if not self._several:
            return
        if self._words is None:
            self._words = [to_device(ids, torch.int64, logits.device) for ids in self._several]
            if self._first_ids:
                resumed = to_device(self._first_ids, torch.int64, logits.device)
                self._last = [*resumed.split(1), *self._last][-self._num_kept :]
        if not self._last:
            return
        last = torch.cat(self._last)
        for word in self._words:
            num_begun = word.shape[0] - 1
            if num_begun <= last.shape[0]:
                is_begun = (last[last.shape[0] - num_begun :] == word[:-1]).all()
                end = logits[word[-1:]]
                logits.index_copy_(0, word[-1:], torch.where(is_begun, float("-inf"), end))


def apply_logit_rules(
    logits: torch.Tensor, rows: Sequence[SamplingRow], grammar_masks: Mapping[str, bytes], eos_token_ids: Sequence[int]
) -> None:
    """Change float32 `logits` [batch_size, vocab_size] in place, row i by the rules of `rows[i]`."""
    for index, row in enumerate(rows):
        params = row.state.params
        if params.repetition_penalty != 1.0:
            _apply_repetition_penalty(logits[index], row)
        if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            _apply_count_penalties(logits[index], row)
        if params.logit_bias:
            ids = to_device(list(params.logit_bias), torch.int64, logits.device)
            biases = to_device(list(params.logit_bias.values()), torch.float32, logits.device)
            logits[index].index_add_(0, ids, biases)
        if params.allowed_token_ids or row.bad_words is not None:
            _apply_bans(logits[index], row)
        if row.num_output_tokens < params.min_new_tokens:
            banned = [*eos_token_ids, *params.stop_token_ids]
            if banned:
                logits[index].index_fill_(0, to_device(banned, torch.int64, logits.device), float("-inf"))
        mask = grammar_masks.get(row.state.rid)
        if mask is not None:
            _apply_grammar_mask(logits[index], mask)


def _apply_repetition_penalty(logits: torch.Tensor, row: SamplingRow) -> None:
    """Logits of tokens in prompt and output: divided by the penalty if positive, else multiplied (CTRL, 2019)."""
    state = row.state
    if row.seen_tokens is None:
        row.seen_tokens = torch.zeros_like(logits, dtype=torch.bool)
        row.seen_tokens.index_fill_(0, to_device(state.prompt_ids + state.output_ids, torch.int64, logits.device), True)
    penalty = state.params.repetition_penalty
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    logits.copy_(torch.where(row.seen_tokens, penalised, logits))


def _apply_count_penalties(logits: torch.Tensor, row: SamplingRow) -> None:
    """Subtract frequency_penalty * count and presence_penalty from output tokens (OpenAI's API reference)."""
    if row.token_counts is None:
        counts = torch.bincount(torch.tensor(row.state.output_ids, dtype=torch.int64), minlength=logits.shape[0])
        row.token_counts = to_device(counts.numpy(), torch.float32, logits.device)
    params = row.state.params
    logits -= params.frequency_penalty * row.token_counts + params.presence_penalty * (row.token_counts > 0)


def _apply_bans(logits: torch.Tensor, row: SamplingRow) -> None:
    """Ban all tokens but the allowed ones, and those that make bad words."""
    allowed = row.state.params.allowed_token_ids
    if row.banned_tokens is None:
        banned = torch.full_like(logits, bool(allowed), dtype=torch.bool)
        if allowed:
            banned.index_fill_(0, to_device(allowed, torch.int64, logits.device), False)
        if row.bad_words is not None and row.bad_words.single_ids:
            banned.index_fill_(0, to_device(row.bad_words.single_ids, torch.int64, logits.device), True)
        row.banned_tokens = banned
    logits.masked_fill_(row.banned_tokens, float("-inf"))
    if row.bad_words is not None:
        row.bad_words.ban(logits)


def _apply_grammar_mask(logits: torch.Tensor, mask: bytes) -> None:
    """Ban the tokens whose bit is 0; lowest bit first."""
    allowed = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")[: logits.shape[0]]
    logits.masked_fill_(~to_device(allowed, torch.bool, logits.device), float("-inf"))
