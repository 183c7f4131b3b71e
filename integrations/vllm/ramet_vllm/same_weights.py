"""Owns the agreement of one vLLM's ranks before any of them shows its weights: all have the same version, or none."""

from typing import NamedTuple

import torch
from ramet.srt.weights.version import check_same_version

MESSAGE_BYTES = 4096
TAKEN, FAILED = "taken ", "failed "


class Outcome(NamedTuple):
    """What one rank's taking came to."""

    version: str = ""  # of the weights that it has
    failure: str = ""  # why it has none

    def encode(self) -> torch.Tensor:
        """As bytes of the same length whatever it says: uint8, [MESSAGE_BYTES]."""
        text = FAILED + self.failure if self.failure else TAKEN + self.version
        message = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8, device="cpu")
        data = text.encode()[:MESSAGE_BYTES]
        message[: len(data)] = torch.tensor(list(data), dtype=torch.uint8, device="cpu")
        return message

    @classmethod
    def decode(cls, message: torch.Tensor) -> "Outcome":
        text = bytes(message.tolist()).rstrip(b"\0").decode(errors="replace")
        return cls(failure=text.removeprefix(FAILED)) if text.startswith(FAILED) else cls(text.removeprefix(TAKEN))


def exchange(own: Outcome, group: torch.distributed.ProcessGroup, size: int) -> list[Outcome]:
    """Every rank's outcome, by rank. A rank that has ended instead is an error of the group's."""
    if size == 1:
        return [own]
    messages = [torch.zeros(MESSAGE_BYTES, dtype=torch.uint8, device="cpu") for _ in range(size)]
    group.allgather([messages], [own.encode()]).wait()
    return [Outcome.decode(message) for message in messages]


def find_failure(outcomes: list[Outcome]) -> str:
    """Why the instance does not have its weights; "" if it has.

    Raises:
        ValueError: if its ranks have taken weights of different versions.
    """
    failures = {rank: outcome.failure for rank, outcome in enumerate(outcomes) if outcome.failure}
    if not failures:
        check_same_version({rank: outcome.version for rank, outcome in enumerate(outcomes)})
        return ""
    if len(outcomes) == 1:
        return failures[0]
    return "; ".join(f"rank {rank}: {failure}" for rank, failure in failures.items())
