"""Owns the way of spans to an OpenTelemetry collector. Without --otlp-traces-endpoint nothing of it is imported.

What spans say is for those who make them. A tracer is a process's own, as its log is.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import ramet
from ramet.srt.observability.logs import SeldomFrom
from ramet.srt.observability.request_record import current_request

logger = logging.getLogger(__name__)

LOG_PERIOD_S = 60.0
CLOSE_TIMEOUT_S = 3.0  # for what is left to reach the collector
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
GRPC, HTTP = "grpc", "http/protobuf"
HTTP_PATH = "/v1/traces"
Attributes = Mapping[str, Any]


class Tracer:
    """Makes spans and sends them, in a thread of its own.

    Args:
        endpoint: of the collector: host:port or a URL.
        attributes: of the process, in each of its spans.

    Raises:
        ValueError: if a package is missing, or the environment asks for a protocol that is not known.
    """

    def __init__(self, endpoint: str, attributes: Attributes) -> None:
        protocol = next(filter(None, map(os.environ.get, PROTOCOL_VARIABLES)), GRPC)
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            exporter = _exporter(endpoint, protocol)
        except ImportError as error:
            raise ValueError(f"--otlp-traces-endpoint needs ramet[otel]: {error}") from None
        resource = Resource.create({"service.name": "ramet", "service.version": ramet.__version__, **attributes})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("ramet")

    def begin(self, name: str, headers: Mapping[str, str]) -> Any:
        """A span of a request that begins now, in its caller's trace if `headers` (traceparent) name one."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(dict(headers))
        return self._tracer.start_span(name, context, SpanKind.SERVER)

    def add(
        self,
        name: str,
        begun: float,
        ended: float,
        attributes: Attributes,
        parent: Any = None,
        error: str | None = None,
    ) -> Any:
        """A span that is over, and was no request.

        Args:
            begun, ended: unix seconds.
            parent: another span; None where it is the first of its trace.
            error: what went wrong.
        """
        from opentelemetry.trace import set_span_in_context

        context = None if parent is None else set_span_in_context(parent)
        span = self._tracer.start_span(name, context, attributes=dict(attributes), start_time=_nanoseconds(begun))
        end(span, error, ended)
        return span

    def close(self) -> None:
        """Send what there is. A collector that does not answer is waited for a few seconds at most."""
        thread = threading.Thread(target=self._provider.shutdown, name="send-traces", daemon=True)
        thread.start()
        thread.join(CLOSE_TIMEOUT_S)
        if thread.is_alive():
            logger.warning("the last traces have not reached their collector within %g s", CLOSE_TIMEOUT_S)


def end(span: Any, error: str | None = None, ended: float | None = None) -> None:
    """End a span, now or at `ended` (unix seconds), as a failure if there is an error."""
    if error is not None:
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR, error))
    span.end(None if ended is None else _nanoseconds(ended))


def _exporter(endpoint: str, protocol: str) -> Any:
    url = endpoint if "://" in endpoint else f"http://{endpoint}"
    if protocol == GRPC:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=url, insecure=url.startswith("http://"))
    if protocol == HTTP:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter

        has_path = url.rstrip("/").count("/") > 2
        return HttpSpanExporter(endpoint=url if has_path else url.rstrip("/") + HTTP_PATH)
    raise ValueError(f"{PROTOCOL_VARIABLES[0]} must be {GRPC} or {HTTP}; got {protocol!r}")


def _nanoseconds(unix_seconds: float) -> int:
    return int(unix_seconds * 1e9)


_tracers: list[Tracer] = []
_complaints = SeldomFrom(LOG_PERIOD_S, "opentelemetry")  # of a collector that is not there, or does not answer


def start_traces(endpoint: str, attributes: Attributes) -> Tracer:
    """Send this process's spans from now on. Raises what Tracer raises."""
    tracer = Tracer(endpoint, attributes)
    _tracers.append(tracer)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_complaints)
    return tracer


def stop_traces() -> None:
    """Send no more of them."""
    while _tracers:
        _tracers.pop().close()
    for handler in logging.getLogger().handlers:
        handler.removeFilter(_complaints)


def tracer() -> Tracer | None:
    """The process's; None without --otlp-traces-endpoint."""
    return _tracers[-1] if _tracers else None


def trace_work(name: str, seconds: float, attributes: Attributes, error: str | None = None) -> None:
    """A span of work that has ended now and has taken so long, of the request that has asked for it, if one has."""
    if (own := tracer()) is not None:
        request, now = current_request(), time.time()
        own.add(name, now - seconds, now, attributes, None if request is None else request.span, error)
