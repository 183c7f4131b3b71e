"""Owns how old a record is. Wall clocks may be wrong or jump; nobody who is alive may vanish by that."""

import time
from collections.abc import Callable

Key = tuple[str, str, int]


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


class AgeTracker:
    """Ages records from the moment at which this process first saw their `updated_at`, by a clock that never jumps.

    A value that is first seen gets the age that the wall clock gives it, but not below 0. So a record that was old
    when it came stays old, a time stamp from the future does not keep a dead worker listed, and a jump of the wall
    clock ages nobody who was there before.

    Args:
        wall_ms: the wall clock in unix milliseconds; None where it cannot be compared with the one that made the
            stamps, as in a client: then what is first seen is new.
    """

    def __init__(
        self, wall_ms: Callable[[], int] | None = wall_clock_ms, monotonic_s: Callable[[], float] = time.monotonic
    ):
        self._wall_ms = wall_ms
        self._monotonic_s = monotonic_s
        self._seen: dict[Key, tuple[int, float]] = {}  # -> updated_at, and when by the monotonic clock its age was 0

    def age_s(self, source_id: str, worker_id: str, worker_rank: int, updated_at: int) -> float:
        """Seconds since the record was written."""
        key = (source_id, worker_id, worker_rank)
        seen = self._seen.get(key)
        now = self._monotonic_s()
        if seen is None or seen[0] != updated_at:
            age_s = (self._wall_ms() - updated_at) / 1000 if self._wall_ms is not None else 0.0
            seen = self._seen[key] = (updated_at, now - max(0.0, age_s))
        return now - seen[1]
