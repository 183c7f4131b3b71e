"""Owns the instance's Prometheus metrics. Names are SGLang's, with our prefix, where the concept is the same."""

import contextlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ramet.srt.managers.generation import RunningSequence
from ramet.srt.managers.io_struct import FinishReason, GetInternalStateReqOutput, LinearStateStats, RequestOutput
from ramet.srt.weights.report import LoadReport, PublisherStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
QUEUE_BUCKETS = (0.0, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
LENGTH_BUCKETS = tuple(2**power for power in range(21))  # tokens
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6)


class TokenMetrics(Collector):
    """What is counted for each token: in plain numbers, until somebody asks for the metrics."""

    def __init__(self, model_name: str):
        self._model_name = model_name
        self._num_tokens = 0
        self._bucket_counts = [0] * (len(TOKEN_BUCKETS) + 1)
        self._sum_s = 0.0

    def observe(self, num_tokens: int, gaps_s: Sequence[float]) -> None:
        """A sequence has got tokens, each so long after the one before it; its very first is after none."""
        self._num_tokens += num_tokens
        for gap_s in gaps_s:
            self._bucket_counts[bisect_left(TOKEN_BUCKETS, gap_s)] += 1
            self._sum_s += gap_s

    def collect(self) -> Iterator[Metric]:
        labels, values = ["model_name"], [self._model_name]
        tokens = CounterMetricFamily("ramet:generation_tokens", "Output tokens.", labels=labels)
        tokens.add_metric(values, self._num_tokens)
        yield tokens
        latency = HistogramMetricFamily(
            "ramet:inter_token_latency_seconds", "Between two output tokens of a request.", labels=labels
        )
        bounds = map(floatToGoString, (*TOKEN_BUCKETS, float("inf")))
        counts = map(float, accumulate(self._bucket_counts))
        latency.add_metric(values, list(zip(bounds, counts, strict=True)), self._sum_s)
        yield latency


class Metrics:
    """One instance's metrics in a registry of their own, so that several instances fit into one process."""

    def __init__(self, model_name: str):
        disable_created_metrics()  # the library's "…_created" samples, which nobody asks for
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}

        def counter(name: str, text: str) -> Counter:
            return Counter(f"ramet:{name}", text, ["model_name"], registry=self.registry).labels(**self._labels)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"ramet:{name}", text, ["model_name"], registry=self.registry).labels(**self._labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            whole = Histogram(f"ramet:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
            return whole.labels(**self._labels)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that got an output.")
        self.tokens = TokenMetrics(model_name)
        self.registry.register(self.tokens)
        self.cached_tokens = counter("cached_tokens", "Prompt tokens that came from the prefix cache.")
        self.num_requests = counter("num_requests", "Sequences that have finished, aborted ones not counted.")
        self.num_aborted = counter("num_aborted_requests", "Sequences that were aborted or refused by the scheduler.")
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From a request to its first output.", LATENCY_BUCKETS
        )
        self.e2e_latency = histogram("e2e_request_latency_seconds", "From a request to its end.", LATENCY_BUCKETS)
        self.time_per_output_token = histogram(
            "time_per_output_token_seconds", "Of a request, on average, behind the first output.", TOKEN_BUCKETS
        )
        self.queue_time = histogram(
            "queue_time_seconds",
            "From a request's arrival at its replica to the first pass with it, or its end without one.",
            QUEUE_BUCKETS,
        )
        self.prompt_lengths = histogram("prompt_tokens_histogram", "Prompt tokens of a request.", LENGTH_BUCKETS)
        self.output_lengths = histogram(
            "generation_tokens_histogram", "Output tokens of a request that has finished.", LENGTH_BUCKETS
        )
        self.num_running_reqs = gauge("num_running_reqs", "Requests that are being computed.")
        self.num_queue_reqs = gauge("num_queue_reqs", "Requests that wait.")
        self.queue_oldest = gauge(
            "queue_oldest_seconds", "For which the request has waited that has waited longest; 0 if none waits."
        )
        self.num_used_tokens = gauge("num_used_tokens", "KV cache slots held by running requests.")
        self.num_prefix_tokens = gauge("num_prefix_cache_tokens", "KV cache slots held by the prefix cache alone.")
        self.max_total_num_tokens = gauge("max_total_num_tokens", "KV cache slots that there are.")
        self.token_usage = gauge("token_usage", "Share of the KV cache that running requests hold.")
        self.gen_throughput = gauge("gen_throughput", "Output tokens per second, lately.")
        self.num_retracted = gauge("num_retracted_reqs", "Requests that were put back for lack of KV cache, in total.")
        self.cache_hit_rate = gauge("cache_hit_rate", "Share of all prompt tokens that came from the prefix cache.")
        self.num_state_slots = gauge("state_slots", "Slots for states of linear layers that there are.")
        self.num_used_state_slots = gauge("state_slots_used", "Slots for states that running requests hold.")
        self.num_snapshots = gauge("state_snapshots", "Slots for states that hold that of a cached prefix.")
        self.num_snapshot_hits = gauge("state_snapshot_hits", "Requests that began from a snapshot, in total.")
        self.num_snapshot_evictions = gauge(
            "state_snapshot_evictions", "Snapshots that gave way to requests, newer ones or pages, in total."
        )
        self.startup_seconds = gauge("startup_seconds", "From the launch to ready.")
        self._weight_version = Gauge(
            "ramet:weight_version",
            "1 for the version of the weights that is served.",
            ["model_name", "weight_version"],
            registry=self.registry,
        )
        self._of_adapter = Counter(
            "ramet:lora_requests",
            "Of the sequences that have finished, those with an adapter.",
            ["model_name", "lora_name"],
            registry=self.registry,
        )
        self._load = {
            name: Gauge(f"ramet:weight_load_{name}", text, ["model_name", "source", "rank"], registry=self.registry)
            for name, text in (
                ("bytes", "Bytes of weights in the rank's arena."),
                ("seconds", "Seconds that filling the arena took."),
            )
        }
        self._load_taken = Gauge(
            "ramet:weight_load_taken_bytes",
            "Of the bytes of weights in the rank's arena, those that a seed gave.",
            ["model_name", "seed", "rank"],
            registry=self.registry,
        )
        self._modelexpress = {
            name: Gauge(f"ramet:modelexpress_{name}", text, ["model_name", "replica"], registry=self.registry)
            for name, text in (
                ("ready", "1 while the ModelExpress server was last told that the replica's first rank is READY."),
                ("publishes", "Times that the rank's record was published, in total."),
                ("heartbeats", "Updates of the record that the server took, in total."),
                ("lost_records", "Times that the server had lost the record, in total."),
                ("failures", "Calls to the server that failed, in total."),
            )
        }
        self._given = Gauge(
            "ramet:weight_given_bytes",
            "Bytes of weights that others have taken piece by piece from the replica's first rank, in total.",
            ["model_name", "replica"],
            registry=self.registry,
        )
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0

    def observe_weight_version(self, version: str) -> None:
        """Which version is served from now on."""
        self._weight_version.clear()
        self._weight_version.labels(**self._labels, weight_version=version).set(1)

    def observe_load(self, rank: int, report: LoadReport) -> None:
        """How a rank's weights came."""
        labels = {**self._labels, "source": report.source, "rank": str(rank)}
        self._load["bytes"].labels(**labels).set(report.num_bytes)
        self._load["seconds"].labels(**labels).set(report.seconds)
        for seed, num_bytes in zip(report.taken_from, report.taken_bytes, strict=True):
            self._load_taken.labels(**self._labels, seed=seed, rank=str(rank)).set(num_bytes)

    def observe_output(self, sequence: RunningSequence, output: RequestOutput, now: float, *, begins: bool) -> None:
        """A sequence has got this now.

        Args:
            begins: whether it had nothing before, and has something now.
        """
        self.tokens.observe(len(output.token_ids), output.gaps_s)
        if begins:
            self.prompt_tokens.inc(sequence.prompt_tokens)
            self.cached_tokens.inc(output.cached_tokens)
            self._num_prompt_tokens += sequence.prompt_tokens
            self._num_cached_tokens += output.cached_tokens
            is_first = sequence.request.stream  # or else this has come after the first token
            self.time_to_first_token.observe(now - sequence.created_s if is_first else sequence.ttft_s)
            self.queue_time.observe(output.queue_time_s)
            self.prompt_lengths.observe(sequence.prompt_tokens)
        elif not sequence.has_begun and output.queue_time_s:
            self.queue_time.observe(output.queue_time_s)  # it has waited for nothing

    def observe_end(self, sequence: RunningSequence, reason: FinishReason) -> None:
        """A sequence has finished."""
        if reason.type == "abort":
            self.observe_abort()
        else:
            self.num_requests.inc()
            self.e2e_latency.observe(sequence.e2e_latency_s)
            self.output_lengths.observe(len(sequence.output_ids))
            if len(sequence.output_ids) > 1:
                seconds = sequence.e2e_latency_s - sequence.ttft_s
                self.time_per_output_token.observe(seconds / (len(sequence.output_ids) - 1))
            self._observe_adapter(sequence.request.lora_name)

    def _observe_adapter(self, name: str) -> None:
        if name:
            self._of_adapter.labels(**self._labels, lora_name=name).inc()

    def forget_adapter(self, name: str) -> None:
        """An adapter is gone, and so is what it has counted."""
        with contextlib.suppress(KeyError):  # of older versions of the library, for what has counted nothing
            self._of_adapter.remove(self._labels["model_name"], name)

    def observe_abort(self) -> None:
        """A sequence was given up."""
        self.num_aborted.inc()

    def observe_states(self, states: Sequence[GetInternalStateReqOutput]) -> None:
        """The numbers of the replicas' schedulers; what is shown is their sum, and the oldest of all that wait."""
        used = sum(state.num_used_tokens for state in states)
        self.num_running_reqs.set(sum(state.num_running_reqs for state in states))
        self.num_queue_reqs.set(sum(state.num_waiting_reqs for state in states))
        self.queue_oldest.set(max((state.queue_oldest_s for state in states), default=0.0))
        self.num_used_tokens.set(used)
        self.num_prefix_tokens.set(sum(state.num_cached_tokens for state in states))
        num_slots = sum(state.max_total_num_tokens for state in states)
        self.max_total_num_tokens.set(num_slots)
        self.token_usage.set(used / max(1, num_slots))
        self.gen_throughput.set(sum(state.last_gen_throughput for state in states))
        self.num_retracted.set(sum(state.num_retracted_reqs for state in states))
        self._observe_linear_states([state.linear_states for state in states if state.linear_states is not None])
        for replica, state in enumerate(states):
            self._given.labels(**self._labels, replica=str(replica)).set(state.num_given_bytes)
            if state.modelexpress is not None:
                self._observe_publisher(replica, state.modelexpress)

    def _observe_linear_states(self, states: Sequence[LinearStateStats]) -> None:
        self.num_state_slots.set(sum(state.num_slots for state in states))
        self.num_used_state_slots.set(sum(state.num_used for state in states))
        self.num_snapshots.set(sum(state.num_snapshots for state in states))
        self.num_snapshot_hits.set(sum(state.num_hits for state in states))
        self.num_snapshot_evictions.set(sum(state.num_evictions for state in states))

    def _observe_publisher(self, replica: int, stats: PublisherStats) -> None:
        values = {
            "ready": stats.status == "READY",
            "publishes": stats.num_publishes,
            "heartbeats": stats.num_heartbeats,
            "lost_records": stats.num_lost,
            "failures": stats.num_failures,
        }
        for name, value in values.items():
            self._modelexpress[name].labels(**self._labels, replica=str(replica)).set(value)

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        self.cache_hit_rate.set(self._num_cached_tokens / max(1, self._num_prompt_tokens))
        return generate_latest(self.registry)
