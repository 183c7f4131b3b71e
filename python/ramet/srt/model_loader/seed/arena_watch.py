"""Owns a seed's doubts about its own memory: whether it still holds what was offered, a bit of it now and then.

Memory that a network card or another process may write to can be changed by whoever reaches it, and nothing else would
notice: neither the seed's answers nor those of its clients would be an error.
"""

import logging
import threading
from collections.abc import Callable, Sequence

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.manifest import WeightChecksums, WeightEntry

logger = logging.getLogger(__name__)


class ArenaWatch:
    """A thread that compares a published arena with its checksums: samples of all of it, and one part after the other.

    A change of a whole tensor is found with the next look where the device has quick samples, any other when its part
    has its turn.
    """

    def __init__(
        self, arena: WeightArena, checksums: WeightChecksums, interval_s: float, on_change: Callable[[str], None]
    ) -> None:
        """
        Args:
            interval_s: from one look to the next.
            on_change: called once, in the thread, with a line that says what has changed, or why nobody can tell.
        """
        self._arena = arena
        self._interval_s = interval_s
        self._on_change = on_change
        entries = arena.manifest.entries
        self._expected = dict(zip((entry.name for entry in entries), checksums.values, strict=True))
        self._samples = checksums.samples
        self._parts = make_parts(entries, arena.watched_nbytes)
        self._next = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="check-weights", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End after the look that is being taken."""
        self._closing.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def look(self) -> list[str]:
        """The names of tensors that have changed, among those that were looked at now."""
        entries = self._arena.manifest.entries
        samples = self._arena.quick_samples(entries)
        before = self._samples if samples else ()
        named = zip(entries[: len(samples)], samples, before, strict=True)
        changed = [entry.name for entry, now, expected in named if now != expected]
        if self._parts:
            part = self._parts[self._next % len(self._parts)]
            self._next += 1
            hashed = zip(part, self._arena.hash_entries(part), strict=True)
            changed += [entry.name for entry, now in hashed if now != self._expected[entry.name]]
        return list(dict.fromkeys(changed))

    def _run(self) -> None:
        rank, role = self._arena.manifest.parallel.world_rank, self._arena.manifest.role
        weights = f"the {role} weights of rank {rank}"
        try:
            self._arena.make_current()
            while not self._closing.wait(self._interval_s):
                if changed := self.look():
                    offered = "have been changed in memory since they were offered"
                    self._on_change(f"{weights} {offered}: {name_some(changed)}")
                    return
        except Exception as error:
            logger.exception("%s can't be compared with what was offered", weights)
            self._on_change(f"{weights} can't be compared with what was offered: {error!r}")


def make_parts(entries: Sequence[WeightEntry], max_nbytes: int) -> list[list[WeightEntry]]:
    """The entries, in order, in parts of about `max_nbytes`; longer ones are a part of their own."""
    parts: list[list[WeightEntry]] = []
    nbytes = 0
    for entry in entries:
        if not entry.nbytes:
            continue
        if not parts or nbytes + entry.nbytes > max_nbytes:
            parts.append([])
            nbytes = 0
        parts[-1].append(entry)
        nbytes += entry.nbytes
    return parts
