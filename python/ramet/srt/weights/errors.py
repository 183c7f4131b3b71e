"""Owns the error of a weight transfer between instances, and how errors name tensors."""

from collections.abc import Sequence

from ramet.srt.observability.logs import escape_text

MAX_NAMED = 5
MAX_ERROR_LEN = 10_000  # characters


class WeightTransferError(RuntimeError):
    """Weights could not be taken from a seed, or be offered to others.

    Attributes:
        stage: what was being done, for example "ask", "agree", "map", "transfer", "verify", "register".
        rank: the world rank whose weights they are.
        seed: the address of the other side.
        cause: what went wrong.
    """

    def __init__(self, stage: str, rank: int, seed: str, cause: object) -> None:
        super().__init__(escape_text(f"{stage} failed for rank {rank} of {seed}: {cause}", MAX_ERROR_LEN))
        self.stage = stage
        self.rank = rank
        self.seed = seed
        self.cause = cause


def name_some(names: Sequence[str]) -> str:
    """The first few of what may be thousands of names, and how many more there are."""
    shown = ", ".join(names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED} more"
