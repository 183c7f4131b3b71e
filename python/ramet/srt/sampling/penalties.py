"""Owns the rules that change one request's logits before sampling: penalties, biases, banned and allowed tokens."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from ramet.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)


def apply_logit_rules(logits: torch.Tensor, reqs: Sequence[Req], eos_token_ids: Sequence[int]) -> None:
    """Change float32 `logits` [batch_size, vocab_size] in place, row i by the rules of `reqs[i]`."""
    for row, req in enumerate(reqs):
        params = req.sampling_params
        if params.repetition_penalty != 1.0:
            _apply_repetition_penalty(logits[row], req)
        if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            _apply_count_penalties(logits[row], req)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[row, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if len(req.output_ids) < params.min_new_tokens:
            banned = [*eos_token_ids, *params.stop_token_ids]
            if banned:
                logits[row, torch.tensor(banned, device=logits.device)] = float("-inf")
        if req.grammar is not None:
            _apply_grammar(logits[row], req)


@torch.inference_mode()
def update_penalty_state(req: Req, token_id: int) -> None:
    """Count a new output token for the requests whose rules need it."""
    if req.token_counts is not None:
        req.token_counts[token_id] += 1
    if req.seen_tokens is not None:
        req.seen_tokens[token_id] = True


def _apply_repetition_penalty(logits: torch.Tensor, req: Req) -> None:
    """Logits of tokens in prompt and output: divided by the penalty if positive, else multiplied (CTRL, 2019)."""
    if req.seen_tokens is None:
        req.seen_tokens = torch.zeros_like(logits, dtype=torch.bool)
        req.seen_tokens[torch.tensor(req.fill_ids, device=logits.device)] = True
    penalty = req.sampling_params.repetition_penalty
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    logits.copy_(torch.where(req.seen_tokens, penalised, logits))


def _apply_count_penalties(logits: torch.Tensor, req: Req) -> None:
    """Subtract frequency_penalty * count and presence_penalty from output tokens (OpenAI's API reference)."""
    if req.token_counts is None:
        ids = torch.tensor(req.output_ids, dtype=torch.int64, device=logits.device)
        req.token_counts = torch.bincount(ids, minlength=logits.shape[0]).to(logits.dtype)
    params = req.sampling_params
    logits -= params.frequency_penalty * req.token_counts + params.presence_penalty * (req.token_counts > 0)


def _apply_grammar(logits: torch.Tensor, req: Req) -> None:
    """Ban what the grammar does not allow next. The mask has one bit for each token, lowest bit first."""
    words = np.zeros(-(-logits.shape[0] // 32), dtype=np.int32)
    try:
        req.grammar.fill_mask(words)
    except RuntimeError as error:  # the grammar library gave up, on a resource limit: nothing is allowed
        logger.warning("request %s: %s", req.rid, error)
        words[:] = 0
    allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: logits.shape[0]]
    logits.masked_fill_(~torch.from_numpy(allowed).bool().to(logits.device), float("-inf"))
