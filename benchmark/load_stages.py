"""Takes the times of the stages of a load from files, in all its threads. Changes nothing of it; measures no limits."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from ramet.srt.model_loader.arena import cuda_reader, host_reader
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.utils import cuda_driver

BUCKET_S = 0.02  # of the course of reading


@dataclass
class Call:
    """One call of a stage, in seconds since the load's start."""

    stage: str
    begin: float
    end: float
    nbytes: int = 0  # that it has read


class LoadStages:
    """The calls of one load. Use `recording` around it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []  # appending is safe in all threads
        self._start = 0.0

    @contextlib.contextmanager
    def recording(self, arena: WeightArena) -> Iterator[None]:
        """Note the load's calls; one load at a time in this process."""
        stages: list[tuple[Any, str, str]] = [
            (CheckpointSource, "__init__", "read headers"),
            (CheckpointSource, "plan", "plan"),
            (CheckpointSource, "fill", "fill, all of it"),
            (type(arena), "prepare_fill", "zero what no file fills"),
            (cuda_reader._PinnedBuffer, "__init__", "pin a buffer"),
            (cuda_reader._PinnedBuffer, "wait", "wait for a slice"),
            (cuda_driver, "queue_upload", "queue a copy"),
            (cuda_driver, "record_event", "record an event"),
            (torch.cuda.Stream, "synchronize", "wait for the stream"),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, stage in stages:
                stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name), stage)))
            for reader in (host_reader, cuda_reader):
                read = self._timed(reader.read_range, "read a range", lambda _fds, _index, _offset, into: len(into))
                stack.enter_context(mock.patch.object(reader, "read_range", read))
                run = functools.partial(self._run_in_threads, reader.run_in_threads)
                stack.enter_context(mock.patch.object(reader, "run_in_threads", run))
            self._start = time.perf_counter()
            yield

    def _timed(self, function: Callable, stage: str, nbytes_of: Callable[..., int] = lambda *_: 0) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                end = time.perf_counter()
                self.calls.append(Call(stage, begin - self._start, end - self._start, nbytes_of(*args)))

        return timed

    def _run_in_threads(self, run: Callable, jobs: Any, make_worker: Callable, *rest: Any) -> None:
        self._timed(run, "threads, all of them")(jobs, self._timed(make_worker, "make a thread ready"), *rest)

    def table(self) -> list[str]:
        """A line for each stage, in the order in which they begin, and the course of reading."""
        lines = [f"{'stage':<24} {'from':>7} {'to':>7} {'calls':>6} {'sum':>8} {'longest':>8}   (ms)"]
        by_stage: dict[str, list[Call]] = {}
        for call in sorted(self.calls, key=lambda call: call.begin):
            by_stage.setdefault(call.stage, []).append(call)
        for stage, calls in by_stage.items():
            lengths = [1e3 * (call.end - call.begin) for call in calls]
            begin, end = 1e3 * calls[0].begin, 1e3 * max(call.end for call in calls)
            lines.append(f"{stage:<24} {begin:>7.1f} {end:>7.1f} {len(calls):>6} {sum(lengths):>8.1f} "
                         f"{max(lengths):>8.2f}")  # fmt: skip
        rates = " ".join(f"{nbytes / BUCKET_S / 1e9:.0f}" for nbytes in self.read_course())
        return [*lines, f"GB/s read in each {1e3 * BUCKET_S:.0f} ms: {rates}"]

    def read_course(self) -> list[int]:
        """Bytes of the reads that ended in each bucket since the start."""
        reads = [call for call in self.calls if call.stage == "read a range"]
        course = [0] * (1 + int(max((call.end for call in reads), default=0.0) / BUCKET_S))
        for call in reads:
            course[int(call.end / BUCKET_S)] += call.nbytes
        return course
