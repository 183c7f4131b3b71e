"""Owns what is written down of each HTTP request once it has ended: a count, a line of the log. Plain ASGI.

A refused request always has a line, with the reason. Others have one with --log-requests. Below level 2 neither has
what users write: logged_text.py.
"""

import asyncio
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ramet.srt.entrypoints.http.event_stream import CLIENT_GONE_STATUS
from ramet.srt.entrypoints.http.http_access import HEALTH_PATHS
from ramet.srt.entrypoints.http.http_counts import OTHER_ENDPOINT, HttpCounts
from ramet.srt.entrypoints.http.logged_text import MAX_TARGET_CHARS, cut, without_query, without_texts
from ramet.srt.observability.logs import written_together
from ramet.srt.observability.request_record import RequestRecord, current_request

logger = logging.getLogger(__name__)

MAX_ERROR_BYTES = 64 << 10  # of an answer that says what is wrong
SHOWN_CHARS = 2048  # of a prompt or an output, from level 2 on
SHOWN_IDS = 256
WRITE_PERIOD_S = 0.1
END_TIMEOUT_S = 5.0  # for the ends of sequences whose client has gone
UNTRACED_PATHS = HEALTH_PATHS | {"/metrics"}
WITH_PARAMETERS, WITH_BEGINNINGS, WHOLE = 1, 2, 3  # levels of --log-requests-level


class LogConfig(NamedTuple):
    """What of requests is logged."""

    log_requests: bool = False
    level: int = 0


class Exchange:
    """One request and its answer, as they look from outside."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope = scope
        self.begun_s, self.begun_at = time.monotonic(), time.time()
        self.ended_s = self.begun_s
        self.status = CLIENT_GONE_STATUS  # unless something is sent
        self.num_bytes = 0
        self._send = send
        self._error_body = b""

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on, and note it."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            self.num_bytes += len(body)
            if self.status >= 400 and len(self._error_body) < MAX_ERROR_BYTES:
                self._error_body += body
        await self._send(message)

    @property
    def error(self) -> str | None:
        """What the answer says is wrong; None for a success."""
        if self.status < 400:
            return None
        try:
            return str(json.loads(self._error_body)["error"]["message"])
        except (ValueError, TypeError, KeyError):
            return self._error_body[:200].decode(errors="replace")

    @property
    def client(self) -> str:
        return str((self.scope.get("client") or ("-",))[0])

    @property
    def seconds(self) -> float:
        return self.ended_s - self.begun_s


Ended = tuple[Exchange, RequestRecord, str | None]  # a request with what was wrong


class Trace(NamedTuple):
    """How requests get into traces: what begins a span for one, and what ends it, with its error."""

    begin: Callable[[str, Mapping[str, str]], Any]
    end: Callable[[Exchange, RequestRecord, str | None], None]


class RequestLogMiddleware:
    """Counts and logs each request when its answer has ended.

    Args:
        paths: of the routes; other paths count together.
        trace: None without traces.
    """

    def __init__(
        self,
        app: ASGIApp,
        counts: HttpCounts,
        paths: Collection[str],
        config: LogConfig,
        trace: Trace | None = None,
    ):
        self._app = app
        self._counts = counts
        self._paths = frozenset(paths)
        self._config = config
        self._lines = RequestLines(config.level)
        self.flush = self._lines.flush  # at the end of the server
        self._trace = trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, send)
        if self._trace is not None:
            self._begin_trace(scope, self._trace)
        is_asked_for = scope["path"] not in UNTRACED_PATHS  # by a user, and no scrape that would count itself
        self._counts.num_active += is_asked_for
        try:
            await self._app(scope, receive, exchange.send)
        finally:
            self._counts.num_active -= is_asked_for
            exchange.ended_s = time.monotonic()
            self._note(exchange)

    def _note(self, exchange: Exchange) -> None:
        scope, record = exchange.scope, current_request()
        assert record is not None
        self._counts.count(self._endpoint(scope), record.method, exchange.status)
        error = exchange.error or record.error
        is_refused = error is not None and exchange.status != CLIENT_GONE_STATUS
        if error is not None and not (self._config.log_requests and self._config.level >= WITH_BEGINNINGS):
            error = without_texts(error)
        if self._config.log_requests:
            self._lines.add(exchange, record, error)
        elif is_refused and scope["path"] not in HEALTH_PATHS:
            fields = request_fields(exchange, record) | {"error": error}
            text = "refused: %s %s from %s: %d %s"
            logger.info(text, record.method, record.target, exchange.client, exchange.status, error,
                        extra={"fields": fields})  # fmt: skip
        if self._trace is not None and record.span is not None:
            self._trace.end(exchange, record, error)
        record.is_over = True

    def _begin_trace(self, scope: Scope, trace: Trace) -> None:
        """Give a request its span; probes and scrapes, which nobody looks for, have none."""
        record, path = current_request(), scope["path"]
        if record is None or path in UNTRACED_PATHS:
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        endpoint = path if path in self._paths else OTHER_ENDPOINT
        record.span = trace.begin(f"{record.method} {endpoint}", headers)

    def _endpoint(self, scope: Scope) -> str:
        """The route that answered."""
        path = getattr(scope.get("route"), "path", scope["path"])
        return path if path in self._paths else OTHER_ENDPOINT


class RequestLines:
    """The lines of --log-requests, which are made and written together several times a second.

    One by one they would cost each request some percent of its time: little in a loop, much where caches are cold.
    """

    def __init__(self, level: int) -> None:
        self._level = level
        self._waiting: list[Ended] = []

    def add(self, exchange: Exchange, record: RequestRecord, error: str | None) -> None:
        """A request has ended."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(WRITE_PERIOD_S, self._write_known)
        self._waiting.append((exchange, record, error))

    def flush(self) -> None:
        """Write what has not been written yet."""
        waiting, self._waiting = self._waiting, []
        self._write(waiting)

    def _write_known(self) -> None:
        """Write those of which all is known. Others wait for it: a sequence ends a bit after its client has gone."""
        since = time.monotonic() - END_TIMEOUT_S
        waiting, self._waiting = self._waiting, []
        known: list[Ended] = []
        for one in waiting:
            exchange, record, _ = one
            is_open = exchange.ended_s > since and has_open_sequences(record)
            (self._waiting if is_open else known).append(one)
        if self._waiting:
            asyncio.get_running_loop().call_later(WRITE_PERIOD_S, self._write_known)
        self._write(known)

    def _write(self, ended: Sequence[Ended]) -> None:
        if ended and logger.isEnabledFor(logging.INFO):
            with written_together():
                for exchange, record, error in ended:
                    logger.handle(_line_of(exchange, record, self._level, error))


def _line_of(exchange: Exchange, record: RequestRecord, level: int, error: str | None) -> logging.LogRecord:
    """The combined log format, then what the request cost as name=value."""
    scope = exchange.scope
    headers = dict(scope["headers"])
    referrer = without_query(headers.get(b"referer", b"-").decode("latin-1"))
    agent = cut(headers.get(b"user-agent", b"-").decode("latin-1"), MAX_TARGET_CHARS)
    request = f"{record.method} {record.target} HTTP/{scope['http_version']}"
    line = (
        f"{exchange.client} - - [{_moment(int(exchange.begun_at))}] {_quoted(request)} {exchange.status} "
        f"{exchange.num_bytes} {_quoted(referrer)} {_quoted(agent)}"
    )
    costs = {"seconds": round(exchange.seconds, 4), **generation_fields(record, level)}
    if error is not None:
        costs["error"] = error
    fields = request_fields(exchange, record) | costs | {"referrer": referrer, "user_agent": agent}
    extra = {"fields": fields, "costs": costs, "is_whole": level >= WHOLE, "request_id": record.request_id}
    made = logger.makeRecord(logger.name, logging.INFO, __file__, 0, line, (), None, extra=extra)
    made.created = exchange.begun_at + exchange.seconds
    return made


@functools.lru_cache(maxsize=4)
def _moment(unix_seconds: int) -> str:
    """As the combined log format has it."""
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%d/%b/%Y:%H:%M:%S +0000")


def request_fields(exchange: Exchange, record: RequestRecord) -> dict[str, Any]:
    """What JSON lines say of every request that they are about."""
    return {
        "client": exchange.client,
        "method": record.method,
        "path": record.target,
        "status": exchange.status,
        "bytes": exchange.num_bytes,
        "seconds": round(exchange.seconds, 4),
    }


def has_open_sequences(record: RequestRecord) -> bool:
    """Whether something is still computed for a request, or was when last heard of."""
    return any(one.finish_reason is None for _, generation in record.generations for one in generation.sequences)


def generation_fields(record: RequestRecord, level: int) -> dict[str, Any]:
    """What was computed for a request: counts of tokens, times, and what else the level asks for."""
    sequences = [sequence for _, generation in record.generations for sequence in generation.sequences]
    if not sequences:
        return {}
    num_prompt = num_cached = num_output = 0
    queue_s, ttft_s, reasons = 0.0, math.inf, []
    for sequence in sequences:
        num_prompt += sequence.prompt_tokens
        num_cached += sequence.cached_tokens
        num_output += len(sequence.output_ids)
        queue_s = max(queue_s, sequence.queue_time_s)
        if sequence.has_begun:
            ttft_s = min(ttft_s, sequence.ttft_s)
        reasons.append("none" if sequence.finish_reason is None else sequence.finish_reason.type)
    fields: dict[str, Any] = {
        "rid": ",".join([generation.rid for _, generation in record.generations]),
        "prompt_tokens": num_prompt,
        "cached_tokens": num_cached,
        "completion_tokens": num_output,
        "queue_seconds": round(queue_s, 4),
        "ttft_seconds": round(ttft_s, 4) if ttft_s < math.inf else 0.0,
        "finish_reason": ",".join(reasons),
        "weight_version": sequences[-1].weight_version,
    }
    if lora := sequences[0].request.lora_name:
        fields["lora_name"] = lora
    if level >= WITH_PARAMETERS:
        fields["sampling_params"] = msgspec.to_builtins(sequences[0].request.sampling_params)
    if level >= WITH_BEGINNINGS:
        is_whole = level >= WHOLE
        inputs = [one for given, _ in record.generations for one in given]
        fields["inputs"] = [_cut(one.text if one.text is not None else one.input_ids, is_whole) for one in inputs]
        fields["outputs"] = [_cut(sequence.text, is_whole) for sequence in sequences]
    return fields


def _cut(content: str | list[int] | None, is_whole: bool) -> str | list[int] | None:
    """The beginning of a text, or of token ids."""
    if content is None or is_whole:
        return content
    return content[: SHOWN_CHARS if isinstance(content, str) else SHOWN_IDS]


def _quoted(text: str) -> str:
    """In double quotes, in which no other stands."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
