"""Owns what a standby counts beside the model that it serves. It is a collector of each model's registry, too."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.7, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Counted(Protocol):
    """A standby, as its metrics show it."""

    @property
    def is_standby(self) -> bool:
        """Whether it could become a model now."""

    @property
    def num_kept(self) -> int:
        """Models that it has put down and keeps."""


class StandbyMetrics(Collector):
    """Numbers without a model's name: they go on when the model is another one."""

    def __init__(self, standby: Counted):
        self._standby = standby
        self._num_failed = 0
        self._buckets = {way: [0] * (len(BUCKETS) + 1) for way in ("new", "kept")}
        self._sums = dict.fromkeys(self._buckets, 0.0)

    def observe(self, way: str, seconds: float) -> None:
        """It has become something."""
        if way in self._buckets:
            self._buckets[way][bisect_left(BUCKETS, seconds)] += 1
            self._sums[way] += seconds

    def observe_failure(self) -> None:
        """It has not become what was asked for."""
        self._num_failed += 1

    def collect(self) -> Iterator[Metric]:
        standby = self._standby
        yield GaugeMetricFamily(
            "ramet:standby", "1 while it serves no model and could become one, 0 otherwise.", float(standby.is_standby)
        )
        yield GaugeMetricFamily("ramet:standby_kept_models", "Models put down and kept.", float(standby.num_kept))
        yield CounterMetricFamily("ramet:becomes_failed", "Changes that were refused or have failed.", self._num_failed)
        becomes = HistogramMetricFamily(
            "ramet:become_seconds", "From a request to become a model until it serves, or is none.", labels=["way"]
        )
        bounds = [floatToGoString(bound) for bound in (*BUCKETS, float("inf"))]
        for way, counts in self._buckets.items():
            becomes.add_metric([way], list(zip(bounds, map(float, accumulate(counts)), strict=True)), self._sums[way])
        yield becomes


def own_registry(metrics: StandbyMetrics) -> CollectorRegistry:
    """For the time in which no model has one."""
    registry = CollectorRegistry()
    registry.register(metrics)
    return registry
