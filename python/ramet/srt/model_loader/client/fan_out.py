"""Owns taking weights piece by piece together with others that take the same, each from whoever has a piece.

Each piece is checked when it has come, and given on from then on. It brings what it can: what is missing at the end,
because all that had it have failed, is left to the caller.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.client.local import open_local
from ramet.srt.model_loader.client.piece_sources import PieceSource, RemoteWays
from ramet.srt.model_loader.client.seed_instance import SeedInstance, SeedRank
from ramet.srt.model_loader.client.transfer import RankSource
from ramet.srt.model_loader.client.verification import ChecksumMismatch
from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedServer
from ramet.srt.model_loader.transport.peer_hub import SILENCE_S, PeerHub
from ramet.srt.observability.progress_bar import BYTES, progress_bar
from ramet.srt.utils.net import SeedAddress, host_identity, is_loopback, reachable_host
from ramet.srt.weights.copy_op import CopyOp
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightChecksums, WeightManifest, layout_digest
from ramet.srt.weights.peer_messages import Holds, Others, PeerLink, PeerOffer, content_name, from_bits, to_bits
from ramet.srt.weights.pieces import Giver, Piece, PieceBoard, cut_into_pieces
from ramet.srt.weights.planner import ArenaSource, zero_ranges
from ramet.srt.weights.registration import LocalHandle, SeedAnswer

logger = logging.getLogger(__name__)

MAX_PEERS = 6  # with two readers of a seed, what a transport process reads at a time
SEED_READERS = 2  # of one that takes alone; of several each has one
MAX_WORKERS = 64  # over a whole load: each peer that comes has one, and each seed
LOOK_S = 0.05
HOPELESS_S = 2.0  # for another one to come that has what is missing


class OpenDoors(Protocol):
    """The arena's doors, as PeerOffer describes them."""

    def as_peer(self, peer_id: str, http_port: int) -> PeerOffer: ...

    def close(self) -> None: ...


# Opens an arena for others before it is full; the hub becomes the doors'. Raises WeightTransferError or OSError.
DoorOpener = Callable[[WeightArena, PeerHub], OpenDoors]


class FanOut:
    """One rank's part of it. Use `run` once; `close`, unless its doors were left to the arena."""

    def __init__(
        self, arena: WeightArena, seeds: Sequence[SeedInstance], config: LoadConfig, open_doors: DoorOpener
    ) -> None:
        """
        Args:
            seeds: that `can_fan_out` has found fit.

        Raises:
            OSError: if there is no address at which others could reach this host.
        """
        manifest = seeds[0].ranks[0].answer.manifest
        assert manifest is not None and manifest.checksums is not None
        self._arena, self._config = arena, config
        self._manifest, self._checksums = manifest, manifest.checksums
        self._expected = dict(zip((entry.name for entry in manifest.entries), manifest.checksums.values, strict=True))
        self._rank = arena.manifest.parallel.world_rank
        self._pieces = cut_into_pieces(arena.manifest)
        self._id = secrets.token_hex(8)
        self._board = PieceBoard([piece.nbytes for piece in self._pieces], self._id)
        self._changed = threading.Condition()
        self._sources: list[PieceSource] = []
        self._pool = ThreadPoolExecutor(MAX_WORKERS, thread_name_prefix="take-pieces")
        self._workers: list[Future[None]] = []
        self._is_over = False
        self._news_at = time.monotonic()  # when the last piece came
        self._remote = RemoteWays(arena, config)
        self._hub = PeerHub(reachable_host(config.host), content_name(manifest))
        self._doors: OpenDoors | None = None
        self._opening = threading.Thread(target=self._open, args=(open_doors,), name="open-doors", daemon=True)
        self.received: list[tuple[SeedRank, CopyOp]] = []
        self.errors: dict[str, WeightTransferError] = {}  # of seeds that have failed, by their names
        self.source_names: list[str] = []
        self.seconds = 0.0
        self._seeds = seeds

    @property
    def missing(self) -> list[CopyOp]:
        return [_op(self._pieces[piece]) for piece in sorted(self._board.missing | self._board.under_way)]

    def run(self) -> None:
        """Bring all that can be had.

        Raises:
            MemoryError: if the weights don't fit into memory.
        """
        self._arena.prepare_fill(zero_ranges(self._arena.manifest))
        start = time.perf_counter()
        self._opening.start()
        nbytes = sum(piece.nbytes for piece in self._pieces)
        try:
            with progress_bar(nbytes, "taking weights", **BYTES) as advance:
                self._advance = advance
                with self._changed:
                    self._news_at = time.monotonic()
                    for rank in [seed.ranks[0] for seed in self._seeds]:
                        giver = Giver(is_local=rank.is_local, is_whole=True)
                        self._start_workers(self._add(rank, giver, rank.answer.link, is_seed=True))
                self._wait()
        finally:
            self._end()
        self.seconds = time.perf_counter() - start
        if self._board.is_done:
            self._finish()

    def leave_doors(self) -> None:
        """Others go on taking from the arena: whoever publishes it takes its doors over."""
        self._arena.doors = self._doors

    def close(self) -> None:
        """Nobody takes anything from here any more."""
        if self._opening.ident is not None:
            self._opening.join()
        if self._doors is not None:
            self._doors.close()
        self._hub.close()

    # What is heard, in the hub's thread

    def note_holds(self, source: PieceSource, holds: Holds) -> None:
        with self._changed:
            source.was_heard = True
            giver = source.giver
            giver.is_whole = holds.is_whole
            giver.has = from_bits(holds.has, len(self._pieces))
            giver.awaits = from_bits(holds.awaits, len(self._pieces))
            self._changed.notify_all()

    def note_others(self, source: PieceSource, others: Others) -> None:
        with self._changed:
            if source.is_seed:
                self._board.index, self._board.count = others.index, max(1, others.count)
            known = {one.rank.answer.link for one in self._sources if one.is_alive}
            for offer in others.offers:
                num_peers = sum(one.is_alive and not one.is_seed for one in self._sources)
                if offer.link in known or offer.peer_id == self._id or num_peers >= MAX_PEERS or self._is_over:
                    continue
                rank = self._rank_of(offer)
                if rank.is_local or rank.answer.session_id:
                    self._start_workers(self._add(rank, Giver(is_local=rank.is_local), offer.link, is_seed=False))

    def note_silence(self, source: PieceSource, *, is_silent: bool) -> None:
        with self._changed:
            source.giver.is_silent = is_silent
            source.heard_at = time.monotonic() - SILENCE_S
            source.giver.is_usable = source.is_alive and (source.giver.is_usable or not is_silent)
            self._changed.notify_all()

    def note_end(self, source: PieceSource, reason: str) -> None:
        """A seed that has never been heard here may still give."""
        with self._changed:
            source.giver.is_silent = False
            if source.was_heard or not source.is_seed:
                self._drop(source, WeightTransferError("transfer", self._rank, source.rank.seed, reason))
            elif source.is_alive:
                source.giver.is_usable = True
                logger.info("rank %d: nothing is heard of others that take from %s: %s",
                            self._rank, source.rank.seed, reason)  # fmt: skip
            self._changed.notify_all()

    # Under the lock

    def _add(self, rank: SeedRank, giver: Giver, link: PeerLink | None, *, is_seed: bool) -> PieceSource:
        source = PieceSource(self, rank, giver, is_seed=is_seed)
        self._sources.append(source)
        self._board.givers.append(giver)
        if link is not None:
            self._hub.follow(link, source)
        return source

    def _rank_of(self, offer: PeerOffer) -> SeedRank:
        is_local = self._config.local_mode != "off" and bool(offer.socket_name)
        answer = SeedAnswer(
            rank=self._rank,
            remote_instance_transfer_engine_info=(offer.session_id, {}),
            role=self._manifest.role,
            manifest=self._manifest,
            arena_address=offer.arena_address,
            local_handle=LocalHandle(host_identity=offer.host_identity, socket_name=offer.socket_name),
            link=offer.link,
        )
        server = SeedServer(SeedAddress(offer.link.host, offer.http_port or offer.link.port))
        source = ArenaSource(f"the peer {server.name}", self._manifest)
        return SeedRank(server, answer, is_local and offer.host_identity == host_identity(), source, is_peer=True)

    def _start_workers(self, source: PieceSource) -> None:
        for _ in range(SEED_READERS if source.is_seed and not source.giver.is_local else 1):
            self._workers.append(self._pool.submit(self._work, source))

    def _drop(self, source: PieceSource, error: WeightTransferError) -> None:
        if not source.is_alive:
            return
        source.is_alive = source.giver.is_usable = False
        if self._is_over:
            return
        if source.is_seed:
            self.errors[source.rank.seed] = error
        others = sum(one.is_alive for one in self._sources)
        logger.warning("rank %d: no more from %s, %d others go on: %s", self._rank, source.rank.seed, others, error)

    def _tell(self) -> None:
        board = self._board
        self._hub.tell(Holds(to_bits(board.has), to_bits(board.under_way), board.is_done))

    # Workers

    def _next(self, source: PieceSource) -> int | None:
        """What to take; None at the end. Waits until there is something."""
        with self._changed:
            while not self._is_over and source.is_alive:
                idle_s = time.monotonic() - self._news_at
                # Several that share a link bring pieces the sooner, the fewer are on their way at a time.
                is_second = source.is_seed and self._board.count > 1 and bool(source.under_way)
                piece = None if is_second else self._board.pick(source.giver, idle_s)
                if piece is not None:
                    source.under_way[piece], source.began_at = -1, time.monotonic()
                    self._tell()
                    return piece
                self._changed.wait(LOOK_S)
        return None

    def _work(self, source: PieceSource) -> None:
        """Take from one of them, for as long as it gives. What fails beside it ends the others' work, too."""
        is_lost = True
        try:
            if source.giver.is_local:
                self._take_local(source)
            self._take_remote(source)
            is_lost = False
        except WeightTransferError as error:
            is_lost = False
            with self._changed:
                self._drop(source, error)
        finally:
            with self._changed:
                self._is_over = self._is_over or is_lost
                self._changed.notify_all()

    def _take_local(self, source: PieceSource) -> None:
        """By its memory; where that can't be had, it is as on another host."""
        local = open_local(source.rank, self._arena, self._config, for_copy=True)
        if local is None:
            if not source.rank.answer.session_id:
                raise WeightTransferError("transfer", self._rank, source.rank.seed, "its memory can't be had")
            with self._changed:
                source.giver.is_local = False
            return
        with local:
            while (piece := self._next(source)) is not None:
                self._take(source, piece, local, None)

    def _take_remote(self, source: PieceSource) -> None:
        opened: tuple[int, RankSource] | None = None
        while (piece := self._next(source)) is not None:
            try:
                if opened is None or opened[0] != self._remote.generation:
                    opened = self._remote.open(source.rank)
            except WeightTransferError as error:
                self._settle(source, piece, error)
                return
            self._take(source, piece, opened[1], opened[0])

    def _take(self, source: PieceSource, piece: int, way: RankSource, generation: int | None) -> None:
        start = time.monotonic()
        cut = self._pieces[piece]
        source.under_way[piece] = -1 if generation is None else generation
        error: WeightTransferError | None = None
        try:
            for step in way.make_steps([_op(cut)]):
                way.run(step)
            error = self._find_fault(source, cut)
        except (WeightTransferError, OSError, ValueError) as failure:
            if generation is not None and generation != self._remote.generation:
                self._settle(source, piece, None, is_put_back=True)  # it was cut off, and is taken anew
                return
            cause = failure.cause if isinstance(failure, WeightTransferError) else failure
            error = WeightTransferError("transfer", self._rank, source.rank.seed, cause)
            if generation is not None:
                self._remote.cut_off(generation)  # before anybody else fills the same bytes
        if error is None:
            self._note_way(way)
        self._settle(source, piece, error, time.monotonic() - start)

    def _find_fault(self, source: PieceSource, cut: Piece) -> WeightTransferError | None:
        values = self._arena.hash_entries(cut.entries)
        wrong = [e for e, value in zip(cut.entries, values, strict=True) if value != self._expected[e.name]]
        return ChecksumMismatch(self._rank, source.rank.seed, wrong) if wrong else None

    def _note_way(self, way: RankSource) -> None:
        with self._changed:
            if way.name not in self.source_names:
                self.source_names.append(way.name)

    def _settle(
        self,
        source: PieceSource,
        piece: int,
        error: WeightTransferError | None,
        seconds: float = 0.0,
        *,
        is_put_back: bool = False,
    ) -> None:
        with self._changed:
            source.under_way.pop(piece, None)
            if error is not None:
                self._drop(source, error)
            if error is not None or is_put_back:
                self._board.put_back(piece)
            else:
                cut = self._pieces[piece]
                self._board.done(piece, seconds)
                self._news_at = time.monotonic()
                self.received.append((source.rank, _op(cut)))
                self._hub.say_taken(source, cut.nbytes)
                self._advance(cut.nbytes)
            self._tell()
            self._changed.notify_all()

    # The caller's thread

    def _wait(self) -> None:
        """Until all has come, or nothing more can."""
        hopeless_since: float | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or self._board.is_done, LOOK_S)
                if self._is_over or self._board.is_done:
                    return
                now = time.monotonic()
                is_hopeless = self._board.is_hopeless() and not self._board.under_way
                hopeless_since = (hopeless_since or now) if is_hopeless else None
                no_seed = not any(one.is_alive for one in self._sources)
                if now - (hopeless_since or now) > HOPELESS_S or is_hopeless and no_seed:
                    return
                if now - self._news_at > self._config.timeout_s:
                    cause = f"no progress within {self._config.timeout_s:g} s"
                    for source in self._sources:
                        self._drop(source, WeightTransferError("transfer", self._rank, source.rank.seed, cause))
                    return
                self._give_up_silent(now)
                generation = self._remote.generation
                is_stuck = any(
                    not one.is_alive or not one.giver.is_usable and self._are_elsewhere(one)
                    for one in self._sources
                    if generation in one.under_way.values()
                )
            if is_stuck:
                self._remote.cut_off(generation)

    def _give_up_silent(self, now: float) -> None:
        """For as long as they are silent. A busy link holds words back, too, but then pieces take longer as well."""
        for source in self._sources:
            is_late = now - max(source.heard_at, source.began_at) > self._board.patience_s
            if source.giver.is_silent and is_late:
                source.giver.is_usable = False

    def _are_elsewhere(self, source: PieceSource) -> bool:
        return any(self._board.is_elsewhere(piece, source.giver) for piece in source.under_way)

    def _end(self) -> None:
        """Nothing is written to the arena afterwards."""
        with self._changed:
            self._is_over = True
            is_whole = self._board.is_done
            self._changed.notify_all()
        if not is_whole:
            self._remote.cut_off(self._remote.generation)
        self._pool.shutdown()
        self._remote.close()
        for worker in self._workers:
            worker.result()

    def _finish(self) -> None:
        """All has come, and was checked tensor by tensor."""
        self._arena.checksums = WeightChecksums(
            algorithm=self._checksums.algorithm, values=self._checksums.values, samples=self._checksums.samples
        )
        self._opening.join()
        for source in list(self._sources):
            if source.is_seed:
                self._hub.finish(source)
            else:
                self._hub.leave(source)

    def _open(self, open_doors: DoorOpener) -> None:
        """Give on what there is. Where that can't be, this one only takes."""
        try:
            doors = open_doors(self._arena, self._hub)
        except (WeightTransferError, OSError) as error:
            logger.warning("rank %d: what has come is not given on before all has: %s", self._rank, error)
            return
        self._doors = doors
        links = [seed.ranks[0].answer.link for seed in self._seeds]
        if is_loopback(self._hub.link.host) and not all(link is None or is_loopback(link.host) for link in links):
            return  # others that take from there don't reach this host by the address that it has for itself
        self._hub.offer(doors.as_peer(self._id, self._config.http_port))


def can_fan_out(arena: WeightArena, seeds: Sequence[SeedInstance], config: LoadConfig) -> bool:
    """Whether the weights of these seeds can be taken piece by piece: all hold just what the arena will, and say so.

    A seed on this host gives all at once, at the speed of memory.
    """
    if config.backend == "nccl" or config.is_update or not arena.can_pass_on or not seeds:
        return False
    layout = layout_digest(arena.manifest)
    content = ""
    for seed in seeds:
        if len(seed.ranks) != 1 or seed.is_local:
            return False
        manifest = seed.ranks[0].answer.manifest
        if manifest is None or not _is_twin(manifest, layout, arena.checksum_algorithm):
            return False
        content = content or content_name(manifest)
        if content_name(manifest) != content:
            return False
    return any(seed.ranks[0].answer.link is not None for seed in seeds)


def _is_twin(manifest: WeightManifest, layout: str, algorithm: str) -> bool:
    checksums = manifest.checksums
    return checksums is not None and checksums.algorithm == algorithm and layout_digest(manifest) == layout


def _op(piece: Piece) -> CopyOp:
    return CopyOp(source=0, source_offset=piece.start, target_offset=piece.start, row_nbytes=piece.nbytes)
