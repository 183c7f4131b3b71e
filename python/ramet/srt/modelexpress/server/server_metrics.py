"""Owns the metadata server's Prometheus metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CALL_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class ServerMetrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "ramet_modelexpress_calls",
            "Calls by method and outcome: ok, invalid_argument, not_found, store_error.",
            ["method", "outcome"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "ramet_modelexpress_call_seconds",
            "Time that the handler of a call took.",
            ["method"],
            buckets=CALL_BUCKETS,
            registry=self.registry,
        )
        self.unauthenticated = Counter(
            "ramet_modelexpress_unauthenticated_calls",
            "Calls that were refused because they had no valid token.",
            registry=self.registry,
        )
        self.reaped = Counter(
            "ramet_modelexpress_reaped_records",
            "Records that the reaper marked stale or removed.",
            ["action"],
            registry=self.registry,
        )
        self.store_up = Gauge(
            "ramet_modelexpress_store_up",
            "Whether the last pass over the store succeeded.",
            registry=self.registry,
        )
        self.workers = Gauge(
            "ramet_modelexpress_workers",
            "Records by status, as the reaper last saw them.",
            ["status"],
            registry=self.registry,
        )

    def observe_call(self, method: str, outcome: str, seconds: float) -> None:
        self._calls.labels(method, outcome).inc()
        self._seconds.labels(method).observe(seconds)

    def render(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self.registry)
