"""A simulation of clones that take weights piece by piece and give on what they have; docs/scaling.md has its results.

    python benchmark/simulate_pieces.py [--clones 1 2 4 8 16 32] [--rate-mbit 8] [--size-mib 32] [--latency-ms 20]

Who takes which piece from whom decides the class that decides it in Ramet (PieceBoard). Each host has a link of one
rate, each way; transfers share links equally. What a clone has, the others hear `latency-ms` later, and a transfer
begins as much later than it was decided on. benchmark/bench_fan_out.py measures the same with real processes and links.
"""

import argparse
import heapq
from dataclasses import dataclass, field

from ramet.srt.weights.pieces import MAX_PIECE_BYTES, MIN_PIECE_BYTES, NUM_PIECES, Giver, PieceBoard

SEED = -1
MAX_PEERS, SEED_READERS = 6, 2  # as in model_loader/client/fan_out.py
LOOK_S = 0.05  # how often a reader that has found nothing looks again


@dataclass(eq=False)
class Reader:
    """One of a clone's readers: at most one piece of one that gives is on its way to it."""

    clone: int
    source: int
    giver: Giver
    piece: int | None = None
    left: float = 0.0  # bytes
    asked_s: float = 0.0
    begins_s: float = 0.0  # when its bytes do


@dataclass
class Outcome:
    done_s: list[float] = field(default_factory=list)
    seed_bytes: float = 0.0


class PieceSpread:
    """One seed and its clones, which begin at once."""

    def __init__(self, num_clones: int, size: int, rate: float, latency_s: float) -> None:
        """
        Args:
            size: bytes.
            rate: bytes per second of each link, each way.
        """
        piece = min(max(size // NUM_PIECES, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
        self.sizes = [min(piece, size - start) for start in range(0, size, piece)]
        self.rate, self.latency_s = rate, latency_s
        self.now = 0.0
        self.outcome = Outcome()
        self.boards = [PieceBoard(self.sizes, f"clone {index}") for index in range(num_clones)]
        self.readers: list[Reader] = []
        self.views: list[list[Giver]] = [[] for _ in range(num_clones)]  # what others know of each clone
        self.news_s = [0.0] * num_clones  # when each clone's last piece came
        self.events: list[tuple[float, int, set[int], set[int]]] = []  # when others hear what a clone has, and awaits
        self.finished: set[int] = set()
        for index, board in enumerate(self.boards):
            board.index, board.count = index, num_clones
            self._add(index, SEED, Giver(is_whole=True), SEED_READERS if num_clones == 1 else 1)
            for step in range(1, min(MAX_PEERS, num_clones - 1) + 1):
                other = (index + step) % num_clones
                giver = Giver()
                self.views[other].append(giver)
                self._add(index, other, giver, 1)

    def _add(self, clone: int, source: int, giver: Giver, count: int) -> None:
        self.boards[clone].givers.append(giver)
        self.readers += [Reader(clone, source, giver) for _ in range(count)]

    def run(self) -> Outcome:
        while len(self.finished) < len(self.boards):
            self._begin_transfers()
            self._advance()
        return self.outcome

    def _begin_transfers(self) -> None:
        for reader in self.readers:
            if reader.piece is not None or reader.clone in self.finished:
                continue
            board = self.boards[reader.clone]
            reader.piece = board.pick(reader.giver, self.now - self.news_s[reader.clone])
            if reader.piece is not None:
                reader.left = self.sizes[reader.piece]
                reader.asked_s, reader.begins_s = self.now, self.now + self.latency_s
                self._tell(reader.clone)

    def _tell(self, clone: int) -> None:
        board = self.boards[clone]
        heapq.heappush(self.events, (self.now + self.latency_s, clone, board.has, set(board.under_way)))

    def _advance(self) -> None:
        """To the next piece that comes or news that is heard, or until idle readers look again."""
        taking = [reader for reader in self.readers if reader.piece is not None]
        busy = [reader for reader in taking if reader.begins_s <= self.now + 1e-9]
        begins_s = min((reader.begins_s for reader in taking if reader not in busy), default=self.now + LOOK_S)
        num_out: dict[int, int] = {}
        num_in: dict[int, int] = {}
        for reader in busy:
            num_out[reader.source] = num_out.get(reader.source, 0) + 1
            num_in[reader.clone] = num_in.get(reader.clone, 0) + 1
        speeds = [self.rate / max(num_out[reader.source], num_in[reader.clone]) for reader in busy]
        step = min((reader.left / speed for reader, speed in zip(busy, speeds, strict=True)), default=LOOK_S)
        step = min(step, LOOK_S, begins_s - self.now, self.events[0][0] - self.now if self.events else LOOK_S)
        self.now += step
        for reader, speed in zip(busy, speeds, strict=True):
            reader.left -= speed * step
            if reader.left <= 1e-6:
                self._finish(reader)
        while self.events and self.events[0][0] <= self.now + 1e-9:
            _, clone, has, awaits = heapq.heappop(self.events)
            for giver in self.views[clone]:
                giver.has, giver.awaits = has, awaits

    def _finish(self, reader: Reader) -> None:
        board = self.boards[reader.clone]
        assert reader.piece is not None
        board.done(reader.piece, self.now - reader.asked_s)
        if reader.source == SEED:
            self.outcome.seed_bytes += self.sizes[reader.piece]
        reader.piece = None
        self.news_s[reader.clone] = self.now
        self._tell(reader.clone)
        if board.is_done:
            self.finished.add(reader.clone)
            self.outcome.done_s.append(self.now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clones", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rate-mbit", type=float, default=8.0)
    parser.add_argument("--size-mib", type=int, default=32)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    args = parser.parse_args()
    one_s = 0.0
    for count in args.clones:
        size = args.size_mib << 20
        outcome = PieceSpread(count, size, args.rate_mbit * 1e6 / 8, args.latency_ms / 1e3).run()
        last_s = max(outcome.done_s)
        one_s = one_s or last_s
        print(
            f"{count} clones: first {min(outcome.done_s):.2f} s, last {last_s:.2f} s = {last_s / one_s:.2f} x the "
            f"first row's; the seed sends {outcome.seed_bytes / size:.2f} copies",
            flush=True,
        )


if __name__ == "__main__":
    main()
