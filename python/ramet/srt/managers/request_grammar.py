"""Owns where one request stands in its constraint, as the process that computes it has last said."""

import math
from collections.abc import Callable
from typing import NamedTuple

from ramet.srt.sampling.constraint import Constraint

CPU_BURST_S = 2.0  # of computing that a request may have behind it beyond what its tokens earn
CPU_PER_TOKEN_S = 0.02
SLOW_CPU_S = 0.002  # an answer that took longer is one that passes don't wait for


class GrammarFailure(NamedTuple):
    """Why a request can't go on."""

    message: str  # one line for the client
    status_code: int  # 400: it is the constraint; 503: the instance has no room for it now


class RequestGrammar:
    """What one request's output must obey. While `is_busy` nothing is known but `failure`.

    Args:
        step: tells the process of a token, and whether a mask is wanted behind it.
        close: tells it that the request has ended.
    """

    def __init__(
        self,
        number: int,
        constraint: Constraint,
        step: "Callable[[RequestGrammar, int, bool], None]",
        close: "Callable[[RequestGrammar], None]",
    ):
        self.number = number
        self.constraint = constraint
        self._step = step
        self._close = close
        self.token_ids: list[int] = []
        self.mask = b""  # which tokens may come next: one bit each, lowest first, in whole int32 words
        self.is_terminated = False  # nothing but an end-of-sequence token can follow
        self.failure: GrammarFailure | None = None
        self.num_awaited = 1  # answers that are to come
        self.is_open = False  # the first has come
        self.is_slow = False  # passes don't wait for it
        self.cpu_left_s = CPU_BURST_S

    @property
    def is_busy(self) -> bool:
        """Whether an answer is to come."""
        return self.num_awaited > 0

    def advance(self, token_id: int, wants_mask: bool) -> None:
        """Go on by one token. Without `wants_mask` it is the last one."""
        assert not self.is_busy or self.is_open
        self.token_ids.append(token_id)
        self.cpu_left_s = min(CPU_BURST_S, self.cpu_left_s + CPU_PER_TOKEN_S)
        if self.failure is None:
            self._step(self, token_id, wants_mask)

    def take(self, mask: bytes, is_terminated: bool, cpu_s: float) -> None:
        """What the process answers."""
        self.num_awaited -= 1
        self.mask, self.is_terminated = mask, is_terminated
        if self.is_open:
            self.cpu_left_s -= cpu_s
            self.is_slow = cpu_s > SLOW_CPU_S
        self.is_open = True

    def reopen(self) -> None:
        """Its process has ended; another one answers. That costs the request nothing."""
        self.num_awaited = 1
        self.cpu_left_s = math.inf

    def fail(self, message: str, status_code: int) -> None:
        """It can't go on."""
        name = self.constraint.name
        words = "constrained output can't go on" if self.is_open else f"{name} can't be used"
        self.failure = GrammarFailure(f"{words}: {message}", status_code)
        self.num_awaited = 0

    def close(self) -> None:
        """The request has ended. May be called again."""
        self._close(self)

    def allows_beyond(self, token_ids: frozenset[int]) -> bool:
        """Whether a token that is none of `token_ids` may come next."""
        mask = bytearray(self.mask)
        for token_id in token_ids:
            mask[token_id // 8] &= ~(1 << token_id % 8)
        return any(mask)
