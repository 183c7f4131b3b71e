"""Owns the flags about what an instance says of itself."""

from dataclasses import dataclass

from ramet.srt.flags.flag import COUNT, Limit, flag

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class LogFlags:
    """Logs and traces."""

    log_level: str = flag("info", "Least severe log level that is shown.", choices=LOG_LEVELS)
    log_format: str = flag("text", "Form of the log's lines: text, or one JSON object in each.", choices=LOG_FORMATS)
    log_requests: bool = flag(
        False, "Write a line for every request that has ended, in the combined log format, with what it cost."
    )
    log_requests_level: int = flag(
        0,
        "What the lines of --log-requests have: 0 counts and times; 1 the sampling parameters, too; 2 the beginnings "
        "of prompts and outputs, too; 3 the whole of them.",
        limit=Limit(lambda value: 0 <= value <= 3, "be from 0 to 3"),
    )
    decode_log_interval: int | None = flag(
        None,
        "Decode passes from one line about a replica (requests, tokens per second, cache) to the next; when not given, "
        "there is a line every five seconds in which passes are computed.",
        limit=COUNT,
    )
    otlp_traces_endpoint: str | None = flag(
        None,
        "Where OpenTelemetry traces are sent: host:port or a URL, by gRPC, or, with "
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf, by HTTP. Needs the extra otel.",
    )
