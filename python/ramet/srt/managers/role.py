"""Owns what a rank's start and its process ask of either kind of rank, one that leads or one that follows."""

from collections.abc import Callable
from typing import Protocol

from ramet.srt.model_executor.model_runner import ModelRunner

# At the rendezvous: put by each rank that can take passes, by a leader for its whole replica; its value is the version
# of the weights.
READY_KEY = "ready"


class Role(Protocol):
    """What a rank does once its model is there."""

    def task_since(self) -> float | None:
        """time.monotonic() of the beginning of the turn of the rank's loop, or of the pass that it waits for.

        None while that may last: a trace of a profile takes its time to be written. Any thread may ask.
        """

    def load(self) -> float:
        """How busy the rank is, from 0 to 1: its replica's requests over those that can run. Any thread may ask."""

    def get_ready(self, on_phase: Callable[[str], None], /) -> list[str]:
        """Wait for those without whom the rank can't serve.

        Returns:
            On world rank 0, where the scheduler of each replica reads requests; on the others nothing.
        """

    def run_once(self) -> None:
        """Do what there is to do, or wait a moment for it."""

    def finish(self) -> None:
        """End what goes on beside the passes, after the last `run_once`."""

    def close(self) -> None:
        """Close the sockets."""


class RoleSockets(Protocol):
    """What a rank reads from, open before the ranks meet, so that the others know where it is once they have."""

    def begin(self, runner: ModelRunner) -> Role:
        """Connect to the others, who have joined, and take up the role with the rank's model."""
