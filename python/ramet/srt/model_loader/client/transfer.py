"""Owns moving planned ranges from several ranks of several seeds at once, and what becomes of a failed seed's share."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.client.seed_instance import SeedInstance, SeedRank
from ramet.srt.observability.progress_bar import BYTES, progress_bar
from ramet.srt.weights.boxes import ByteRange
from ramet.srt.weights.copy_op import CopyOp
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.planner import PlanError, TransferPlan, plan, zero_ranges

logger = logging.getLogger(__name__)

MAX_CONCURRENT_RANKS = 8
SHARED_BYTES = 64 << 20  # the grain in which equal seeds share the work


class RankSource(Protocol):
    """One rank of a seed, by one way."""

    name: str
    measured_seconds: float  # in which bytes moved, if the source took the time; else 0

    def make_steps(self, ops: Sequence[CopyOp]) -> list[list[CopyOp]]:
        """The operations in pieces that can be told apart when the seed fails."""
        ...

    def run(self, step: list[CopyOp], /) -> None:
        """Fill what one step covers. Raises WeightTransferError, OSError or ValueError if the seed fails."""
        ...


class SourceOpener(Protocol):
    """Opens ranks for one round; what it has opened ends with the round."""

    def open(self, rank: SeedRank) -> RankSource:
        """Raises WeightTransferError if the rank can't be reached."""
        ...

    def close(self) -> None:
        """After every step has ended well."""
        ...

    def abandon(self) -> bool:
        """After one has failed: False if what the arena holds may still be overwritten, and must be dropped."""
        ...


@dataclass
class _Job:
    """One rank's share of a round."""

    rank: SeedRank
    source: RankSource | None
    steps: list[list[CopyOp]]
    num_done: int = 0
    error: WeightTransferError | None = None

    @property
    def done(self) -> list[CopyOp]:
        return [op for step in self.steps[: self.num_done] for op in step]

    @property
    def unfinished(self) -> list[CopyOp]:
        return [op for step in self.steps[self.num_done :] for op in step]


class SeedTransfer:
    """Fills an arena from seeds: in rounds, each over those that have not failed in the one before."""

    def __init__(
        self, arena: WeightArena, seeds: Sequence[SeedInstance], make_opener: Callable[[], SourceOpener]
    ) -> None:
        self._arena = arena
        self._rank = arena.manifest.parallel.world_rank
        self._make_opener = make_opener
        self.alive = list(seeds)
        self.errors: list[WeightTransferError] = []
        self.unfinished: list[CopyOp] | None = None  # None: everything
        self.planned_nbytes = 0
        self.source_names: list[str] = []
        self.transfer_seconds = 0.0  # in which bytes moved
        self._received: list[tuple[SeedRank, CopyOp]] = []  # who has filled what

    @property
    def received_nbytes(self) -> int:
        return sum(op.nbytes for _, op in self._received)

    def given_nbytes(self, worker_ids: Mapping[int, str]) -> dict[str, int]:
        """Who has filled how much.

        Args:
            worker_ids: by which ranks of the seed are called; the others by the seed's address.
        """
        totals: dict[str, int] = {}
        for rank, op in self._received:
            name = rank.seed if rank.is_peer else worker_ids.get(rank.answer.rank, rank.seed)
            totals[name] = totals.get(name, 0) + op.nbytes
        return totals

    def run(self) -> None:
        """Fill all of the arena, or what `unfinished` says.

        Raises:
            WeightTransferError: if all seeds have failed; nothing of them reaches the arena afterwards.
            MemoryError: if the weights don't fit into memory.
        """
        if self.unfinished is None:
            self._arena.prepare_fill(zero_ranges(self._arena.manifest))
        while self.unfinished is None or self.unfinished:
            if not self.alive:
                raise combine_errors(self._rank, self.errors)
            self._run_round()

    def start_with(
        self,
        received: Sequence[tuple[SeedRank, CopyOp]],
        missing: Sequence[CopyOp],
        errors: Mapping[str, WeightTransferError],
        source_names: Sequence[str],
        seconds: float,
    ) -> None:
        """Something has been brought before, and checked, by whoever has failed with the seeds in `errors`."""
        self._received = list(received)
        self.unfinished = list(missing)
        self.planned_nbytes = self._arena.manifest.payload_nbytes
        self.source_names = list(source_names)
        self.transfer_seconds = seconds
        self._drop(dict(errors))

    def blame(self, ranges: Iterable[ByteRange], error: WeightTransferError) -> None:
        """Drop the seeds that have sent these ranges of the arena, which are wrong; all they sent is unfinished again.

        Args:
            error: what is raised when no other seed is left.
        """
        wrong = list(ranges)
        blamed = {
            rank.seed
            for rank, op in self._received
            if any(op.target_offset < stop and op.target_stop > start for start, stop in wrong)
        } or {seed.name for seed in self.alive}
        self.errors.append(error)
        self.alive = [seed for seed in self.alive if seed.name not in blamed]
        self.unfinished = [op for rank, op in self._received if rank.seed in blamed]
        self._received = [(rank, op) for rank, op in self._received if rank.seed not in blamed]

    def _run_round(self) -> None:
        shares = self._share_out()
        opener = self._make_opener()
        try:
            jobs = [_open_job(rank, ops, opener) for rank, ops in shares]
            start = time.perf_counter()
            _run_jobs(jobs)
            self.transfer_seconds += _moving_seconds(jobs) or time.perf_counter() - start
        except BaseException:
            opener.abandon()
            raise
        self._note(jobs)
        errors = {job.rank.seed: job.error for job in jobs if job.error is not None}
        if not errors:
            opener.close()
            return
        if not opener.abandon():
            self._arena.drop_memory()
            self._received, self.unfinished = [], None
        self._drop(errors)

    def _share_out(self) -> list[tuple[SeedRank, list[CopyOp]]]:
        """What each rank is to send of what is unfinished, without those that are to send nothing."""
        # A seed on this host is worth more than one behind a network.
        seeds = [seed for seed in self.alive if seed.is_local] or self.alive
        try:
            ranks, transfer_plan = self._plan(seeds)
        except PlanError as error:  # of a trainer, each rank is a seed that has but a part
            others = [seed for seed in self.alive if seed not in seeds]
            if not others and self.errors:
                raise combine_errors(self._rank, self.errors) from error
            if not others:
                raise
            ranks, transfer_plan = self._plan([*seeds, *others])
        self.planned_nbytes = max(self.planned_nbytes, transfer_plan.nbytes)
        shares = ((rank, transfer_plan.of_source(index)) for index, rank in enumerate(ranks))
        return [(rank, ops) for rank, ops in shares if ops]

    def _plan(self, seeds: Sequence[SeedInstance]) -> tuple[list[SeedRank], TransferPlan]:
        ranks = [rank for seed in seeds for rank in seed.ranks]
        sources = [rank.source for rank in ranks]
        return ranks, plan(self._arena.manifest, sources, max_op_nbytes=SHARED_BYTES, unfinished=self.unfinished)

    def _note(self, jobs: Sequence[_Job]) -> None:
        """Remember who has sent what, and what nobody has."""
        for job in jobs:
            self._received += [(job.rank, op) for op in job.done]
            if job.source is not None and job.num_done and job.source.name not in self.source_names:
                self.source_names.append(job.source.name)
        self.unfinished = [op for job in jobs for op in job.unfinished]

    def _drop(self, errors: dict[str, WeightTransferError]) -> None:
        self.errors += errors.values()
        self.alive = [seed for seed in self.alive if seed.name not in errors]
        if self.alive:
            for name, error in errors.items():
                others = ", ".join(seed.name for seed in self.alive)
                logger.warning("rank %d: the seed %s failed, its share goes to %s: %s", self._rank, name, others, error)


def _open_job(rank: SeedRank, ops: list[CopyOp], opener: SourceOpener) -> _Job:
    try:
        source = opener.open(rank)
        return _Job(rank, source, source.make_steps(ops))
    except WeightTransferError as error:
        return _Job(rank, None, [ops], error=error)


def _moving_seconds(jobs: Sequence[_Job]) -> float:
    """In which bytes moved, if one source alone took the time; else 0: the times of several can't be put together."""
    return jobs[0].source.measured_seconds if len(jobs) == 1 and jobs[0].source is not None else 0.0


def _run_jobs(jobs: Sequence[_Job]) -> None:
    """Run all of them; one that fails stops those of the same seed.

    Raises:
        MemoryError: if there is not enough memory.
    """
    stopped = {job.rank.seed: threading.Event() for job in jobs}

    def work(job: _Job) -> None:
        stop = stopped[job.rank.seed]
        try:
            while job.source is not None and job.num_done < len(job.steps) and not stop.is_set():
                step = job.steps[job.num_done]
                job.source.run(step)
                job.num_done += 1
                advance(sum(op.nbytes for op in step))
        except (WeightTransferError, OSError, ValueError) as error:
            cause = error.cause if isinstance(error, WeightTransferError) else error
            job.error = WeightTransferError("transfer", job.rank.answer.rank, job.rank.seed, cause)
        finally:
            if job.num_done < len(job.steps):
                stop.set()

    nbytes = sum(op.nbytes for job in jobs for op in job.unfinished)
    num_threads = min(MAX_CONCURRENT_RANKS, len(jobs) or 1)
    with (
        progress_bar(nbytes, "taking weights", **BYTES) as advance,
        ThreadPoolExecutor(num_threads, thread_name_prefix="take-weights") as pool,
    ):
        for future in [pool.submit(work, job) for job in jobs]:
            future.result()


def combine_errors(rank: int, errors: Sequence[WeightTransferError]) -> WeightTransferError:
    """One error for the failures of several seeds; the only one itself."""
    if len(errors) == 1:
        return errors[0]
    seeds = ", ".join(dict.fromkeys(error.seed for error in errors))
    return WeightTransferError(errors[-1].stage, rank, seeds, "; ".join(str(error) for error in errors))
