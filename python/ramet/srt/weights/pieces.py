"""Owns the pieces in which weights go from instance to instance, and the choice of what to take next, from whom.

A piece is a run of whole tensors, so that it can be checked by itself. Everybody cuts the same weights alike. Those
that take at the same time share the work: each brings another part from whoever has all, and gives it to the others.
"""

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ramet.srt.weights.manifest import WeightEntry, WeightManifest

NUM_PIECES = 96  # about so many: what a chain of N ends later than one is N - 1 of them
MIN_PIECE_BYTES = 256 << 10  # below, what surrounds a piece costs more than its bytes
MAX_PIECE_BYTES = 64 << 20
MIN_PATIENCE_S = 0.3  # for a piece that is on its way to somebody else
FIRST_PATIENCE_S = 5.0  # the same, as long as nobody knows how long a piece takes
PATIENCE = 3.0  # the same, in times that a piece has taken lately


@dataclass(frozen=True)
class Piece:
    """Tensors that follow each other in the arena."""

    entries: tuple[WeightEntry, ...]
    start: int  # bytes in the arena
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def cut_into_pieces(manifest: WeightManifest) -> list[Piece]:
    """All that the arena holds, in the order of their places. A tensor is never cut."""
    entries = sorted((entry for entry in manifest.entries if entry.nbytes), key=lambda entry: entry.offset)
    size = min(max(manifest.payload_nbytes // NUM_PIECES, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    pieces: list[Piece] = []
    run: list[WeightEntry] = []
    for entry in entries:
        if run and entry.offset + entry.nbytes - run[0].offset > size:
            pieces.append(_piece(run))
            run = []
        run.append(entry)
    if run:
        pieces.append(_piece(run))
    return pieces


def _piece(run: Sequence[WeightEntry]) -> Piece:
    return Piece(tuple(run), run[0].offset, run[-1].offset + run[-1].nbytes)


@dataclass
class Giver:
    """One from whom pieces can be taken, as far as is known."""

    is_local: bool = False
    is_whole: bool = False
    is_usable: bool = True  # False: it has failed, or nothing was heard of it for too long
    is_silent: bool = False  # nothing was heard of it for a moment: it is asked for nothing
    has: set[int] = field(default_factory=set)
    awaits: set[int] = field(default_factory=set)  # what is on its way to it

    def holds(self, piece: int) -> bool:
        return self.is_whole or piece in self.has


class PieceBoard:
    """What one that takes has, what is on its way to it, and what it may take next. Not for several threads."""

    def __init__(self, sizes: Sequence[int], own_id: str) -> None:
        self.sizes = sizes
        self.own_id = own_id
        self.missing = set(range(len(sizes)))
        self.under_way: set[int] = set()
        self.givers: list[Giver] = []
        self.index, self.count = 0, 1  # of the shares into which all that take divide the work
        self._piece_s = 0.0  # that a piece has taken lately

    @property
    def has(self) -> set[int]:
        return set(range(len(self.sizes))) - self.missing - self.under_way

    @property
    def is_done(self) -> bool:
        return not self.missing and not self.under_way

    @property
    def patience_s(self) -> float:
        """How long one that could take a piece from whoever has all waits for another one to bring it."""
        return max(MIN_PATIENCE_S, PATIENCE * self._piece_s) if self._piece_s else FIRST_PATIENCE_S

    def pick(self, giver: Giver, idle_s: float) -> int | None:
        """What to take from one that gives, which is under way then; None if there is nothing now.

        Args:
            idle_s: since when nothing has come from anybody.
        """
        chosen = self._choose(giver, idle_s) if giver.is_usable and not giver.is_silent else None
        if chosen is not None:
            self.missing.discard(chosen)
            self.under_way.add(chosen)
        return chosen

    def done(self, piece: int, seconds: float) -> None:
        """It has come, and was checked."""
        self.under_way.discard(piece)
        self._piece_s = seconds if not self._piece_s else 0.7 * self._piece_s + 0.3 * seconds

    def put_back(self, piece: int) -> None:
        """It has not come."""
        self.under_way.discard(piece)
        self.missing.add(piece)

    def is_elsewhere(self, piece: int, giver: Giver) -> bool:
        """Whether another one could give it now."""
        others = [other for other in self.givers if other is not giver and other.is_usable and not other.is_silent]
        return any(other.holds(piece) for other in others)

    def is_hopeless(self) -> bool:
        """Whether something is missing that nobody has who is known, nor awaits."""
        alive = [giver for giver in self.givers if giver.is_usable]
        return any(not any(giver.holds(piece) or piece in giver.awaits for giver in alive) for piece in self.missing)

    def _choose(self, giver: Giver, idle_s: float) -> int | None:
        wanted = {piece for piece in self.missing if giver.holds(piece)}
        others = [other for other in self.givers if other.is_usable and other is not giver]
        if not giver.is_local:  # what is on this host already, or on its way, does not come over the network again
            near = [other for other in others if other.is_local]
            if any(other.is_whole for other in near):
                return None
            nearby = _union([other.has | other.awaits for other in near])
            wanted = wanted - nearby or (wanted if idle_s > self.patience_s else set())
        if not wanted:
            return None
        parts = [other for other in others if not other.is_whole]
        if giver.is_whole and not giver.is_local:
            num_known = 1 + sum(not other.is_whole for other in self.givers if other is not giver)
            return self._share(wanted, parts, idle_s, is_alone=num_known >= self.count)
        return min(wanted, key=lambda piece: (sum(piece in one.has for one in parts), self._dice(self.own_id, piece)))

    def _share(self, wanted: set[int], parts: Sequence[Giver], idle_s: float, *, is_alone: bool) -> int | None:
        """The own share first, then what nobody has begun; what others bring only if they are too slow.

        Args:
            is_alone: nobody takes who is not known here, or was.
        """
        free = wanted - _union([one.has | one.awaits for one in parts])
        own = {piece for piece in free if self._dice("", piece) % self.count == self.index}
        is_late = idle_s > self.patience_s
        if not own and not is_late and not (free and is_alone):
            return None  # somebody brings it
        # The largest first: whoever waits for it waits from the beginning on.
        return max(own or free or wanted, key=lambda piece: (self.sizes[piece], self._dice(self.own_id, piece)))

    def _dice(self, peer_id: str, piece: int) -> int:
        """A number that everybody throws alike."""
        return zlib.crc32(f"{piece} {peer_id}".encode())


def _union(sets: Collection[set[int]]) -> set[int]:
    return set().union(*sets)
