"""Owns the numbers of HTTP requests by route and status: plain counters, until somebody asks for the metrics."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.core import Metric

OTHER_ENDPOINT = "other"  # of paths that no route has: callers make up as many as they like
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class HttpCounts:
    """A collector for Prometheus's library, which is not imported before it asks."""

    def __init__(self, model_name: str):
        self.model_name = model_name
        self.num_active = 0
        self._responses: Counter[tuple[str, str, int]] = Counter()  # by endpoint, method and status

    def count(self, endpoint: str, method: str, status: int) -> None:
        """A request has been answered, or its client has gone."""
        self._responses[endpoint, method if method in METHODS else "other", status] += 1

    def collect(self) -> "Iterator[Metric]":
        """The metrics now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        labels = ["model_name", "endpoint", "method"]
        requests = CounterMetricFamily("ramet:http_requests", "HTTP requests that have ended.", labels=labels)
        responses = CounterMetricFamily(
            "ramet:http_responses", "HTTP answers by their status.", labels=[*labels, "status_code"]
        )
        totals: Counter[tuple[str, str]] = Counter()
        for (endpoint, method, status), number in sorted(self._responses.items()):
            totals[endpoint, method] += number
            responses.add_metric([self.model_name, endpoint, method, str(status)], number)
        for (endpoint, method), number in totals.items():
            requests.add_metric([self.model_name, endpoint, method], number)
        active = GaugeMetricFamily(
            "ramet:http_requests_active", "HTTP requests under way, but for probes and scrapes.", labels=["model_name"]
        )
        active.add_metric([self.model_name], self.num_active)
        yield from (requests, responses, active)
