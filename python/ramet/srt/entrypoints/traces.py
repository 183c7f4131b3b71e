"""Owns what traces say of an instance: spans of its start with the loads of its weights, and of requests."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ramet.srt.managers.io_struct import SchedulerReady
from ramet.srt.observability.request_record import RequestRecord
from ramet.srt.observability.traces import Tracer, end
from ramet.srt.weights.report import LoadReport

if TYPE_CHECKING:
    from ramet.srt.entrypoints.http.request_log import Exchange
    from ramet.srt.managers.generation import RunningSequence

MAX_SEQUENCES = 16  # of a request, that have spans of their own


def trace_start(tracer: Tracer, launch_time: float, schedulers: Sequence[SchedulerReady]) -> None:
    """The start of an instance that is ready now, with a span for each load of a rank's weights."""
    now = time.time()
    start = tracer.add("start", launch_time, now, {"ramet.num_ranks": len(schedulers)})
    for scheduler in schedulers:
        report = scheduler.load_report
        ended = launch_time + scheduler.phases.get("weights", now - launch_time)
        attributes = {"ramet.rank": scheduler.world_rank, **load_attributes(report)}
        tracer.add("load weights", ended - report.seconds, ended, attributes, start)


def trace_failed_start(tracer: Tracer, launch_time: float, error: str) -> None:
    """A start that has come to nothing, as when no seed could give the weights."""
    tracer.add("start", launch_time, time.time(), {}, error=error)


def load_attributes(report: LoadReport) -> dict[str, Any]:
    """How weights came."""
    attributes: dict[str, Any] = {
        "ramet.weights.source": report.source,
        "ramet.weights.bytes": report.num_bytes,
        "ramet.weights.verified": report.verified,
        "ramet.weights.version": report.weight_version,
        "ramet.weights.taken_from": list(report.taken_from),
        "ramet.weights.taken_bytes": list(report.taken_bytes),
    }
    if report.fallback_reason:
        attributes["ramet.weights.fallback_reason"] = report.fallback_reason
    return attributes


def trace_request(tracer: Tracer, exchange: "Exchange", record: RequestRecord, error: str | None) -> None:
    """End the span of a request, with one for each sequence that was computed for it."""
    span = record.span
    span.set_attribute("http.request.method", record.method)
    span.set_attribute("url.path", record.target.partition("?")[0])
    span.set_attribute("http.response.status_code", exchange.status)
    span.set_attribute("client.address", exchange.client)
    span.set_attribute("ramet.request_id", record.request_id)
    sequences = [sequence for _, generation in record.generations for sequence in generation.sequences]
    clock = time.time() - time.monotonic()
    for sequence in sequences[:MAX_SEQUENCES]:
        _trace_sequence(tracer, span, sequence, clock)
    end(span, error)


def _trace_sequence(tracer: Tracer, parent: Any, sequence: "RunningSequence", clock: float) -> None:
    """A sequence: it waited, its prompt was computed, its tokens came. `clock`: unix seconds less monotonic ones."""
    request, created = sequence.request, sequence.created_s
    last = sequence.last_output_s if sequence.last_output_s is not None else time.monotonic()
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "text_completion" if request.pooling is None else "embeddings",
        "gen_ai.response.id": request.rid,
        "gen_ai.usage.input_tokens": sequence.prompt_tokens,
        "gen_ai.usage.output_tokens": len(sequence.output_ids),
        "ramet.cached_tokens": sequence.cached_tokens,
        "ramet.weights.version": sequence.weight_version,
    }
    if request.pooling is None:
        params = request.sampling_params
        attributes |= {
            "gen_ai.request.max_tokens": params.max_new_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
        }
    if request.lora_name:
        attributes["ramet.lora_name"] = request.lora_name
    if sequence.finish_reason is not None:
        attributes["gen_ai.response.finish_reasons"] = [sequence.finish_reason.type]
    span = tracer.add("generate", created + clock, last + clock, attributes, parent)
    begun = min(created + sequence.queue_time_s, last)
    first = min(begun + sequence.prefill_time_s, last) if sequence.prefill_time_s else last
    tracer.add("queue", created + clock, begun + clock, {}, span)
    tracer.add("prefill", begun + clock, first + clock, {}, span)
    if last > first:
        tracer.add("decode", first + clock, last + clock, {}, span)
