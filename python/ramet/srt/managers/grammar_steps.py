"""Owns the tokens that a constraint has yet to take: until it has, they don't count, and their requests sit out."""

from collections.abc import Sequence
from dataclasses import dataclass

from ramet.srt.batch.batch_plan import LogprobRows
from ramet.srt.managers.grammar_pool import GrammarPool
from ramet.srt.managers.schedule_batch import RunningReq

GRACE_S = 0.005  # how long a pass waits for the constraints whose answers come quickly


@dataclass(frozen=True, eq=False, slots=True)
class ChosenToken:
    """A token that a pass has chosen for a request."""

    running: RunningReq
    token_id: int
    logprobs: LogprobRows | None
    weight_version: str = ""  # by which it was chosen


class GrammarSteps:
    """The requests between a token and what may follow it.

    Args:
        pool: None if there are no constraints.
    """

    def __init__(self, pool: GrammarPool | None):
        self._pool = pool
        self._chosen: dict[RunningReq, ChosenToken] = {}

    def __len__(self) -> int:
        return len(self._chosen)

    def begin(self, chosen: ChosenToken) -> None:
        """Tell a request's constraint of its new token."""
        req = chosen.running.req
        assert req.grammar is not None
        is_last = len(req.output_ids) + 1 >= req.sampling_params.max_new_tokens
        req.grammar.advance(chosen.token_id, not is_last)
        self._chosen[chosen.running] = chosen

    def collect(self) -> list[ChosenToken]:
        """Remove and return the tokens that their constraints have taken, or failed at."""
        done = [chosen for running, chosen in self._chosen.items() if not _is_busy(running)]
        for chosen in done:
            del self._chosen[chosen.running]
        return done

    def unparked(self) -> list[RunningReq]:
        """The requests that still hold KV cache."""
        return [running for running in self._chosen if not running.is_parked]

    def slow(self) -> list[RunningReq]:
        """The requests that still hold KV cache and whose constraint takes its time."""
        return [
            running for running in self.unparked() if running.req.grammar is not None and running.req.grammar.is_slow
        ]

    def parked(self) -> list[RunningReq]:
        """The requests that hold no KV cache meanwhile."""
        return [running for running in self._chosen if running.is_parked]

    def drop(self, running: RunningReq) -> None:
        """Forget a request's token, if there is one: the request has ended."""
        if self._chosen.pop(running, None) is not None:
            running.num_pending -= 1

    def poll(self, timeout_s: float) -> None:
        """Take in what constraints say, after waiting up to `timeout_s` for the first of it."""
        if self._pool is not None:
            self._pool.poll(timeout_s)

    def wait(self) -> None:
        """Wait a moment for the constraints whose answers come quickly."""
        if self._pool is not None and self._chosen:
            grammars = (running.req.grammar for running in self._chosen)
            self._pool.wait([one for one in grammars if one is not None and not one.is_slow], GRACE_S)


def awaits_token(running: Sequence[RunningReq]) -> bool:
    """Whether a pass under way chooses a token for one whose constraint answers quickly."""
    return any(
        one.num_pending > 0 and one.req.grammar is not None and not (one.req.grammar.is_slow or _is_busy(one))
        for one in running
    )


def _is_busy(running: RunningReq) -> bool:
    return running.req.grammar is not None and running.req.grammar.is_busy
