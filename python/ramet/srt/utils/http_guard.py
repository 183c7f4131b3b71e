"""Owns what an HTTP server does about connections that only cost: deadlines, a bound on their number, malformed input.

`guarded_protocol` makes the class that uvicorn runs for each connection. Nothing here knows who a caller is, or what it
may ask.
"""

import asyncio
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from ramet.srt.observability.logs import Seldom
from ramet.srt.utils.file_limit import is_out_of_files, num_free_files

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 64 << 10  # of a request line with its headers
MAX_HEADERS = 128
MAX_TARGET_BYTES = 8 << 10
FEED_BYTES = 64 << 10  # is parsed at once
FREE_CHUNKS = 128  # a body in more chunks than this must have
MIN_CHUNK_BYTES = 32  # so many bytes in each of them, on average
FREE_BODY_BYTES = 256 << 10  # of a body; what is beyond that is read at
BODY_BYTES_PER_S = 64 << 20  # of all connections together: long bodies wait for each other, nobody else for them
MIN_PAUSE_S = 0.002
SWEEP_PERIOD_S = 1.0
HEALTH_RESERVE = 32  # connections beyond the limit, for health checks alone
FILES_RESERVE = 128  # for everything but connections
NUM_EVICTED = 16  # connections that are closed when there are no files left
LOG_PERIOD_S = 10.0
FULL = "all %d connections of the HTTP server are in use (--max-connections)"
NO_FILES = "the HTTP server has no files left to open (ulimit -n)"
QUOTED = re.compile(r"bytearray\(b?('.*'|\".*\")\)")  # what h11 quotes of a request
INVALID = "this is no valid HTTP request"
TLS_BEGINNING = b"\x16\x03"


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """What a connection may cost."""

    max_connections: int
    header_s: float = 10.0  # from the connection, or the first byte of the next request, to the end of its headers
    body_s: float = 30.0  # for a body, and
    body_bytes_per_s: float = 256 << 10  # what it may take beyond that
    write_s: float = 60.0  # in which a reader takes what is ready for it, some 64 kB
    linger_s: float = 5.0  # for a connection that has its last answer to go


class GuardedConnection(h11.Connection):
    """A parser that also refuses what is only sent to cost time, or to mean two things to two readers."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self.error: h11.RemoteProtocolError | None = None
        self.num_body_bytes = 0
        self._num_chunks = 0
        self._asks_for_body = self._sends_chunks = False

    def send(self, event: Any) -> Any:
        """As h11 does it, but a chunk of a body, which changes no state, is framed here: each token is one."""
        if self._sends_chunks and type(event) is h11.Data and self.our_state is h11.SEND_BODY:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        self._sends_chunks = isinstance(event, h11.Response) and self._is_chunked(event)
        return super().send(event)

    def _is_chunked(self, response: h11.Response) -> bool:
        """Whether the body goes in chunks: it has no length, may be there, and the client knows them."""
        has_length = any(name in (b"content-length", b"transfer-encoding") for name, _ in response.headers)
        may_have_body = self._asks_for_body and response.status_code not in (204, 304)
        return may_have_body and not has_length and self.their_http_version == b"1.1"

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self.num_body_bytes = self._num_chunks = 0
                self._asks_for_body = event.method not in (b"HEAD", b"CONNECT")
                _check_request(event)
            elif isinstance(event, h11.Data):
                self._check_data(event)
        except h11.RemoteProtocolError as error:
            self.error = error
            raise
        return event

    def _check_data(self, event: h11.Data) -> None:
        self.num_body_bytes += len(event.data)
        self._num_chunks += event.chunk_start
        if self._num_chunks > FREE_CHUNKS and self.num_body_bytes < MIN_CHUNK_BYTES * self._num_chunks:
            raise h11.RemoteProtocolError(f"chunks must have {MIN_CHUNK_BYTES} bytes or more, on average")


def _check_request(request: h11.Request) -> None:
    names = [name for name, _ in request.headers]
    if len(names) > MAX_HEADERS:
        raise h11.RemoteProtocolError(f"more than {MAX_HEADERS} headers", error_status_hint=431)
    if len(request.target) > MAX_TARGET_BYTES:
        raise h11.RemoteProtocolError(f"the URL has more than {MAX_TARGET_BYTES} bytes", error_status_hint=414)
    if b"transfer-encoding" in names and b"content-length" in names:
        raise h11.RemoteProtocolError("both Transfer-Encoding and Content-Length are given")


class PacedFlow(FlowControl):
    """A connection's reading, which also stops while it has had its share."""

    def __init__(self, transport: Any) -> None:
        super().__init__(transport)
        self._is_held = False

    @property
    def is_stopped(self) -> bool:
        """Whether it is us who keep the peer waiting."""
        return self.read_paused or self._is_held

    def hold(self, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        """Don't read for a while."""
        if not self._is_held and not self._transport.is_closing():
            self._is_held = True
            if not self.read_paused:
                self._transport.pause_reading()
            loop.call_later(seconds, self._release)

    def _release(self) -> None:
        self._is_held = False
        if not self.read_paused and not self._transport.is_closing():
            self._transport.resume_reading()

    def pause_reading(self) -> None:
        if self._is_held:
            self.read_paused = True
        else:
            super().pause_reading()

    def resume_reading(self) -> None:
        if self._is_held:
            self.read_paused = False
        else:
            super().resume_reading()


class GuardedProtocol(H11Protocol):
    """One connection."""

    guard: "ConnectionGuard"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: GuardedConnection = GuardedConnection()
        self._header_since: float | None = None
        self._body_since = self._answered_since = 0.0
        self._unread_since: float | None = None  # the peer does not take what has been written
        self._closing_since: float | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.flow: PacedFlow = PacedFlow(transport)
        self._header_since = time.monotonic()
        self.guard.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._header_since is None and self.conn.their_state is h11.IDLE:
            self._header_since = time.monotonic()
        for start in range(0, len(data), FEED_BYTES):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + FEED_BYTES])
        if self.conn.num_body_bytes > FREE_BODY_BYTES:
            pause_s = self.guard.pace(len(data))
            if pause_s > MIN_PAUSE_S:
                self.flow.hold(pause_s, self.loop)

    def handle_events(self) -> None:
        was_waiting = self.conn.their_state is h11.IDLE
        super().handle_events()
        if was_waiting and self.conn.their_state is not h11.IDLE:
            self._header_since, self._body_since = None, time.monotonic()
            self.guard.busy(self)

    def on_response_complete(self) -> None:
        self._answered_since = time.monotonic()
        self._header_since = None
        self.guard.waits(self)
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._header_since = time.monotonic()

    def pause_writing(self) -> None:
        self._unread_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unread_since = None
        super().resume_writing()

    def _unsupported_upgrade_warning(self) -> None:
        """Every caller can ask for one: nothing to tell the log."""

    def send_400_response(self, msg: str) -> None:
        error = self.conn.error
        reason = QUOTED.sub(r"\1", str(error))[:200] if error else msg
        logged = QUOTED.sub("…", str(error))[:200] if error else msg
        if self.conn.trailing_data[0].startswith(TLS_BEGINNING):
            reason = logged = "it begins as TLS does; this server is reached by http://"
        status = 400 if error is None else error.error_status_hint
        self.refuse(status, f"{INVALID}: {reason}", f"{INVALID}: {logged}")

    def refuse(self, status: int, message: str, logged: str | None = None) -> None:
        """Answer what can't be answered otherwise, if there is still a way to, and close the connection.

        Args:
            logged: what the log says, if the message quotes what may be secret.
        """
        logger.info("refused: a request from %s: %d %s", (self.client or ("-",))[0], status, logged or message)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        detail = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        headers = [("content-type", "application/json"), ("connection", "close")]
        body = json.dumps({"error": detail}).encode()
        headers.append(("content-length", str(len(body))))
        reason = HTTPStatus(status).phrase
        response = h11.Response(status_code=status, headers=headers, reason=reason)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def sweep(self, now: float, limits: HttpLimits) -> None:
        """Close the connection if it has had its time."""
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
            if now - self._closing_since > limits.linger_s:
                self.transport.abort()
        elif self._unread_since is not None and now - self._unread_since > limits.write_s:
            self.guard.log("a client that does not read its answer for %g s is cut off", limits.write_s)
            self.transport.abort()
        elif self._header_since is not None and now - self._header_since > limits.header_s:
            if not self.conn.trailing_data[0]:  # opened for later: an answer would be taken for the next request's
                self.transport.close()
                return
            self.refuse(408, f"the request's headers have not come within {limits.header_s:g} s")
        elif self.conn.their_state is h11.SEND_BODY:
            self._sweep_body(now, limits)

    def _sweep_body(self, now: float, limits: HttpLimits) -> None:
        if self.cycle is None or self.cycle.response_complete:  # answered before the body was there
            if now - self._answered_since > limits.linger_s:
                self.transport.abort()
        elif self.flow.is_stopped:
            self._body_since += SWEEP_PERIOD_S
        elif now - self._body_since > limits.body_s + self.conn.num_body_bytes / limits.body_bytes_per_s:
            self.refuse(408, f"the request's body has not come within {limits.body_s:g} s")


class ConnectionGuard:
    """All connections of one server.

    Args:
        is_health: whether a path is that of a health check, which has room when nothing else has.
    """

    def __init__(self, limits: HttpLimits, is_health: Callable[[str], bool]) -> None:
        self.limits = limits
        self._is_health = is_health
        self._connections: dict[GuardedProtocol, None] = {}
        self._waiting: OrderedDict[GuardedProtocol, None] = OrderedDict()  # for a whole request, the longest first
        self._is_sweeping = False
        self._paced_until = 0.0
        self._log_filter = Seldom(LOG_PERIOD_S, FULL, NO_FILES, "a client that does not read")

    def admit(self, protocol: GuardedProtocol) -> None:
        """Take a new connection; if there are too many, in place of the one that has waited longest for a request."""
        if not self._is_sweeping:
            self._is_sweeping = True
            protocol.loop.call_later(SWEEP_PERIOD_S, self._sweep, protocol.loop)
        self._connections[protocol] = None
        self.waits(protocol)
        if len(self._connections) <= self.limits.max_connections:
            return
        self.log(FULL, self.limits.max_connections)
        if len(self._waiting) > 1:
            self._evict()
        elif len(self._connections) <= self.limits.max_connections + HEALTH_RESERVE:
            protocol.app = _health_only(protocol.app, self._is_health)
        else:
            self.discard(protocol)
            protocol.transport.abort()

    def pace(self, num_bytes: int) -> float:
        """For how long not to read after so many bytes of a long body, in seconds."""
        now = time.monotonic()
        self._paced_until = max(self._paced_until, now) + num_bytes / BODY_BYTES_PER_S
        return self._paced_until - now

    def waits(self, protocol: GuardedProtocol) -> None:
        """The connection waits for a request."""
        if protocol in self._connections:
            self._waiting[protocol] = None
            self._waiting.move_to_end(protocol)

    def busy(self, protocol: GuardedProtocol) -> None:
        """A request has come."""
        self._waiting.pop(protocol, None)

    def discard(self, protocol: GuardedProtocol) -> None:
        """The connection has gone."""
        self._connections.pop(protocol, None)
        self._waiting.pop(protocol, None)

    def log(self, message: str, *args: object) -> None:
        """A warning, but not one for each connection."""
        record = logger.makeRecord(logger.name, logging.WARNING, __file__, 0, message, args, None)
        if self._log_filter.filter(record):
            logger.handle(record)

    def _evict(self) -> None:
        protocol, _ = self._waiting.popitem(last=False)
        self._connections.pop(protocol, None)
        protocol.transport.abort()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_later(SWEEP_PERIOD_S, self._sweep, loop)
        now = time.monotonic()
        for protocol in list(self._connections):
            protocol.sweep(now, self.limits)
        if is_out_of_files():
            self.log(NO_FILES)
            for _ in range(min(NUM_EVICTED, len(self._waiting))):
                self._evict()


def _health_only(app: Any, is_health: Callable[[str], bool]) -> Any:
    """The application when there is no room for more requests."""
    detail = {"message": "the server has too many connections", "type": "server_error", "param": None, "code": None}
    body = json.dumps({"error": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if is_health(scope["path"]):
            await app(scope, receive, send)
        else:
            client = (scope.get("client") or ("-",))[0]
            logger.info("refused: %s %s from %s: 503 %s", scope["method"], scope["path"], client, detail["message"])
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})

    return answer


def guarded_protocol(limits: HttpLimits, is_health: Callable[[str], bool]) -> type[GuardedProtocol]:
    """The class that uvicorn makes an object of for each connection of one server (`http=` of its config)."""

    class Protocol(GuardedProtocol):
        guard = ConnectionGuard(limits, is_health)

    logging.getLogger("uvicorn.error").addFilter(_says_more)
    return Protocol


def _says_more(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's tells what none of ours does, with the reason."""
    return record.msg != "Invalid HTTP request received."


def room_for_connections(wanted: int) -> int:
    """How many connections there are files for, at most `wanted`. Warns if it is less."""
    room = max(16, num_free_files() - FILES_RESERVE)
    if room < wanted:
        logger.warning(
            "the limit of open files (ulimit -n) has room for %d connections, not for %d (--max-connections)",
            room,
            wanted,
        )
    return min(room, wanted)
