"""Owns the measuring of choices: each shape that a layer asks for gets the fastest value that computes right."""

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ramet.srt.errors import one_line
from ramet.srt.layers.kernels.choices import Choice, Key, Value, trying, watching
from ramet.srt.layers.tuned_file import Entry, make_entry
from ramet.srt.model_executor.layer_trials import LayerTrial
from ramet.srt.utils.graph_timing import seconds_in_graph

logger = logging.getLogger(__name__)

# The most of each class comes first: what is measured for it is taken for all of the class.
NUM_ROWS = (2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
LEAST_GAIN = 1.03  # a value must be so many times as fast as the default
MAX_ERROR = 0.08  # relative, from the default's result: rows that one way quantises and another doesn't differ by 0.04
MIN_RUNS = 4  # of one measurement: copies of a layer take turns
NUM_MEASUREMENTS = 7
Run = Callable[[int], torch.Tensor]


@dataclass
class Tuner:
    """Measures on one device, layer by layer; what has been found is taken at once by those that follow."""

    device: torch.device
    entries: list[Entry] = field(default_factory=list)
    tuned: list[tuple[str, Key]] = field(default_factory=list)  # all that was measured
    num_failed: int = 0  # values that don't run there, or not right
    _done: set[tuple[Choice, Key]] = field(default_factory=set)
    _taken: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def tune(self, trial: LayerTrial) -> None:
        """Measure what the layer asks for, with each number of rows."""
        for num_rows in NUM_ROWS:
            if trial.takes(num_rows):
                self._tune_rows(trial.run(num_rows), f"{trial.name} with {num_rows} rows", len(trial.copies))

    def _tune_rows(self, run: Run, what: str, num_copies: int) -> None:
        """Until nothing new is asked for: another way of a product asks for tiles of its own."""
        while True:
            with watching() as seen:
                run(0)
            new = [(*place, default) for place, default in seen.items() if place not in self._done]
            if not new:
                return
            for choice, key, default in new:
                self._done.add((choice, key))
                self._tune_one(choice, key, default, run, what, max(MIN_RUNS, num_copies))

    def _tune_one(self, choice: Choice, key: Key, default: Value, run: Run, what: str, num_runs: int) -> None:
        expected = run(0).float()
        default_s = best_s = self._seconds(run, num_runs)
        best = default
        for value in choice.values:
            if value == default:
                continue
            with trying(choice, key, value):
                seconds = self._try(run, expected, num_runs, f"{choice.name} {value} in {what}")
            if seconds is not None and seconds < best_s:
                best, best_s = value, seconds
        self.tuned.append((choice.name, key))
        shape = ", ".join(f"{name} {number}" for name, number in zip(choice.key, key, strict=True))
        if best == default or best_s * LEAST_GAIN > default_s:
            logger.info("%s (%s): the default stays, %.1f us", choice.name, shape, default_s * 1e6)
            return
        logger.info("%s (%s): %s, %.1f us, not %.1f", choice.name, shape, best, best_s * 1e6, default_s * 1e6)
        self.entries.append(make_entry(choice.name, key, best, best_s * 1e6, default_s * 1e6))
        # For the rest of this process: other choices are measured beside it.
        self._taken.enter_context(trying(choice, key, best))

    def close(self) -> None:
        """Let this process take the defaults again."""
        self._taken.close()

    def _try(self, run: Run, expected: torch.Tensor, num_runs: int, what: str) -> float | None:
        """Seconds; None if it does not run, or does not give what it should.

        Raises:
            RuntimeError: if the device has failed: nothing runs there any more.
        """
        try:
            error = float((run(0).float() - expected).norm() / expected.norm())
            if error <= MAX_ERROR:
                return self._seconds(run, num_runs)
            logger.warning("%s is not taken: it is off by %.1e", what, error)
        except Exception as error:  # noqa: BLE001  whatever a compiler or launch raises: it is not needed
            logger.debug("%s is not taken: %s", what, one_line(error))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.num_failed += 1
        return None

    def _seconds(self, run: Run, num_runs: int) -> float:
        """The median of what one run takes on the device."""
        if self.device.type != "cuda":
            return _seconds_on_cpu(run, num_runs)
        with torch.cuda.device(self.device):
            return seconds_in_graph(run, num_runs, NUM_MEASUREMENTS)


def _seconds_on_cpu(run: Run, num_runs: int) -> float:
    def measure() -> Iterator[float]:
        for turn in range(num_runs):
            start = time.perf_counter()
            run(turn)
            yield time.perf_counter() - start

    return statistics.median(measure())
