"""Owns the way from the last hidden state of pooled prompts to vectors on the host. It plans nothing."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ramet.srt.batch.batch_plan import BatchPlan, Pooling
from ramet.srt.utils.device import HostCopies, to_device

LOGIT_ROWS = 256  # logits of so many prompts are held at once
SMALLEST_NORM = 1e-12  # of a vector that is divided by its length; as torch.nn.functional.normalize has it

PooledTokens = list[tuple[str, Pooling, torch.Tensor]]  # rid, what is wanted, float32 on its way to the host


def queue_pooling(
    plan: BatchPlan,
    hidden_states: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    copies: HostCopies,
) -> PooledTokens:
    """Queue what the pooled sequences of a pass want: on every rank of the stage, for the logits need all of them.

    Args:
        hidden_states: [num_tokens, hidden_size], normalised.
        compute_logits: [num_rows, hidden_size] -> float32 [num_rows, vocab_size].
    """
    rows: list[int] = []
    wanted: list[tuple[str, Pooling]] = []
    end = 0
    for sequence in plan.sequences:
        end += len(sequence.input_ids)
        if sequence.pooling is not None:
            rows.append(end - 1)
            wanted.append((sequence.rid, sequence.pooling))
    if not wanted:
        return []
    states = hidden_states[to_device(rows, torch.int64, hidden_states.device)]
    labelled = [place for place, (_, pooling) in enumerate(wanted) if pooling.label_token_ids]
    plain = [place for place, (_, pooling) in enumerate(wanted) if not pooling.label_token_ids]
    pooled: PooledTokens = []
    for start in range(0, len(labelled), LOGIT_ROWS):
        part = labelled[start : start + LOGIT_ROWS]
        logits = compute_logits(states[to_device(part, torch.int64, states.device)])
        label_ids = [wanted[place][1].label_token_ids for place in part]
        values = copies.add(_label_logprobs(logits, label_ids)).split([len(ids) for ids in label_ids])
        pooled += [(*wanted[place], value) for place, value in zip(part, values, strict=True)]
    if plain:
        vectors = copies.add(states[to_device(plain, torch.int64, states.device)].float())
        pooled += [(*wanted[place], vector) for place, vector in zip(plain, vectors, strict=True)]
    return pooled


def _label_logprobs(logits: torch.Tensor, label_ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """float32 [all labels]: the log-probability of each label of each row, one row behind the other."""
    numbers = [number for number, ids in enumerate(label_ids) for _ in ids]
    rows = to_device(numbers, torch.int64, logits.device)
    columns = to_device([token_id for ids in label_ids for token_id in ids], torch.int64, logits.device)
    return logits[rows, columns] - logits.logsumexp(-1)[rows]


def take_vectors(pooled: PooledTokens) -> dict[str, bytes]:
    """Request id -> float32, once they are on the host: cut and normalised; b"" if a number isn't finite."""
    return {rid: _finish(vector.numpy(), pooling) for rid, pooling, vector in pooled}


def _finish(vector: np.ndarray, pooling: Pooling) -> bytes:
    vector = vector[: pooling.dimensions]
    if not np.isfinite(vector).all():
        return b""
    if pooling.normalize:
        norm = float(np.linalg.norm(vector.astype(np.float64)))  # in which no sum of squares is beyond the numbers
        vector = vector / max(norm, SMALLEST_NORM)
    return vector.astype("<f4").tobytes()
