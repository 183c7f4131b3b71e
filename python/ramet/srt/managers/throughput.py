"""Owns how many tokens have come lately."""

import time
from collections import deque

WINDOW_S = 5.0


class Throughput:
    """Counts the tokens of the last few seconds."""

    def __init__(self) -> None:
        self.total = 0  # since the start
        self._counts: deque[tuple[float, int]] = deque()  # time.monotonic() of a pass, and its tokens

    def add(self, num_tokens: int) -> None:
        """So many tokens have come just now."""
        self.total += num_tokens
        self._counts.append((time.monotonic(), num_tokens))
        self._forget_old()

    def tokens_per_s(self) -> float:
        """Tokens per second over the window."""
        self._forget_old()
        return sum(count for _, count in self._counts) / WINDOW_S

    def _forget_old(self) -> None:
        start = time.monotonic() - WINDOW_S
        while self._counts and self._counts[0][0] < start:
            self._counts.popleft()
