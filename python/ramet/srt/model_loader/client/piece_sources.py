"""Owns what a fan-out knows of each of those it takes from, and the ways to other hosts, which are cut off together."""

import dataclasses
import threading
from typing import Protocol

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.client.open_sources import SeedSources
from ramet.srt.model_loader.client.seed_instance import SeedRank
from ramet.srt.model_loader.client.transfer import RankSource
from ramet.srt.model_loader.transport.peer_hub import Listener
from ramet.srt.weights.peer_messages import Holds, Others
from ramet.srt.weights.pieces import Giver


class Audience(Protocol):
    """Who hears what those say from whom it takes. Called in the hub's thread."""

    def note_holds(self, source: "PieceSource", holds: Holds) -> None: ...

    def note_others(self, source: "PieceSource", others: Others) -> None: ...

    def note_silence(self, source: "PieceSource", *, is_silent: bool) -> None: ...

    def note_end(self, source: "PieceSource", reason: str) -> None: ...


class PieceSource(Listener):
    """One from whom pieces come: a seed, or another one that takes. Its fields change under the fan-out's lock."""

    def __init__(self, owner: Audience, rank: SeedRank, giver: Giver, *, is_seed: bool) -> None:
        self.owner = owner
        self.rank = rank
        self.giver = giver
        self.is_seed = is_seed
        self.is_alive = True
        self.heard_at = 0.0  # before it fell silent, while it is
        self.was_heard = False
        self.began_at = 0.0  # with the newest of these
        self.under_way: dict[int, int] = {}  # pieces, and the generation of the way by which each comes

    def on_holds(self, holds: Holds) -> None:
        self.owner.note_holds(self, holds)

    def on_others(self, others: Others) -> None:
        self.owner.note_others(self, others)

    def on_silence(self, is_silent: bool) -> None:
        self.owner.note_silence(self, is_silent=is_silent)

    def on_end(self, reason: str) -> None:
        self.owner.note_end(self, reason)


class RemoteWays:
    """The ways to other hosts, which are cut off all at once when one of them may still write, and opened again."""

    def __init__(self, arena: WeightArena, config: LoadConfig) -> None:
        self._arena, self._config = arena, config
        self._lock = threading.Lock()
        self._sources = SeedSources(arena, config)
        self.generation = 0

    def open(self, rank: SeedRank) -> tuple[int, RankSource]:
        """Raises WeightTransferError if no transport process starts."""
        with self._lock:
            return self.generation, self._sources.open(dataclasses.replace(rank, is_local=False))

    def cut_off(self, generation: int) -> None:
        """Nothing of what was opened in that generation writes any more afterwards."""
        with self._lock:
            if generation == self.generation:
                self.generation += 1
                old, self._sources = self._sources, SeedSources(self._arena, self._config)
                old.abandon()

    def close(self) -> None:
        """Raises MemoryError if there was not enough for the arena."""
        with self._lock:
            self._sources.close()
