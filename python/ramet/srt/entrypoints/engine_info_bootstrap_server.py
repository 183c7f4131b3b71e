"""Owns the directory of an instance's weights: ranks register here, and clients ask here. Holds no weights itself."""

import contextlib
import hmac
import logging
import re
import socket
import socketserver
import threading
import time
from collections.abc import Collection
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import msgspec

from ramet.srt.observability.logs import Seldom
from ramet.srt.utils.http_origin import OriginCheck
from ramet.srt.utils.net import address_family, format_url, host_from_here
from ramet.srt.weights.manifest import check_role
from ramet.srt.weights.registration import (
    ASLEEP,
    BEING_CHANGED,
    MAX_REGISTRATION_BYTES,
    ControlAddress,
    make_answer,
    parse_registration,
)

logger = logging.getLogger(__name__)

HEADER_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 30.0  # for a body, and for an answer
READ_BYTES = 1 << 20
MAX_CONNECTIONS = 64
MAX_ALL_BODIES_BYTES = 2 * MAX_REGISTRATION_BYTES  # of those that are being read
UNCOUNTED_BYTES = 64 << 10  # of each body
LOG_PERIOD_S = 10.0
POLL_S = 0.1  # how often the time of each connection is looked at, and how long an end takes at most
FULL = "the engine info bootstrap server has %d connections"
NO_FILES = "the engine info bootstrap server can't take a connection"


class EngineInfoBootstrapServer:
    """An HTTP server in a thread of the head node, keyed by (model role, world rank). WIRE: see docs/wire.md.

    The port is bound when the object is made, and free again after `close()`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        admin_api_key: str | None = None,
        api_key: str | None = None,
        num_ranks: int | None = None,
        allowed_hosts: Collection[str] = (),
    ) -> None:
        """
        Args:
            port: 0 takes a free one; `self.port` says which.
            admin_api_key: the bearer key that registering needs, if any; it is good for asking, too.
            api_key: the bearer key that asking needs, if any; and registering, if there is no `admin_api_key`.
            num_ranks: of the instance, if known: others are refused.
            allowed_hosts: see OriginCheck, which takes the place of keys where there are none.

        Raises:
            OSError: if the address can't be bound; the message names it and the flag.
        """
        self._registering_keys = _keys(admin_api_key or api_key)
        self._asking_keys = _keys(api_key, admin_api_key) if api_key else ()
        self._num_ranks = num_ranks
        self.origins = OriginCheck(host, allowed_hosts)
        self._parsing = threading.Lock()  # what is made of a registration takes several times its memory
        self._answers: dict[tuple[str, int], bytes] = {}
        self._controls: dict[tuple[str, int], ControlAddress | None] = {}
        self._suspended: dict[str, tuple[int, str]] = {}  # roles whose weights can't be had now: status and reason
        self._lock = threading.Lock()
        server = self

        class Handler(_Handler):
            directory = server

        try:
            self._http = _HTTPServer(host, port, Handler)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the engine info bootstrap server can't use port {port} of {host} "
                f"(--engine-info-bootstrap-port; 0 takes a free one): {error.strerror}",
            ) from error
        self.host = host
        self.port: int = self._http.server_address[1]
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": POLL_S}, name="engine-info-bootstrap", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it answers, for a caller on this host."""
        return format_url(host_from_here(self.host), self.port)

    def close(self) -> None:
        """Stop answering and free the port. May be called twice."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()

    def get(self, role: str, rank: int) -> dict[str, Any] | None:
        """The answer for a rank, or None if it has not registered."""
        answer = self.get_json(role, rank)
        return None if answer is None else msgspec.json.decode(answer)

    def get_json(self, role: str, rank: int) -> bytes | None:
        """The answer for a rank as JSON text, or None if it has not registered."""
        with self._lock:
            return self._answers.get((role, rank))

    def control_address(self, role: str, rank: int) -> ControlAddress | None:
        """Where a rank takes requests about its weights; None if it has not registered, or takes none."""
        with self._lock:
            return self._controls.get((role, rank))

    def answer(self, rank: str | None, role: str | None = None) -> tuple[int, bytes]:
        """HTTP status and JSON body for the query parameters of a request, here or on the engine's own port."""
        role = role or "target"
        if rank is None or not re.fullmatch(r"[0-9]{1,9}", rank):
            return 400, _error(f"rank must be a whole number that is not negative; got {rank!r}")
        try:
            check_role(role)
        except ValueError as error:
            return 400, _error(str(error))
        if (suspended := self.suspension(role)) is not None:
            return suspended[0], _error(suspended[1])
        found = self.get_json(role, int(rank))
        if found is None:
            return 404, _error(f"rank {int(rank)} of the {role} model has not registered")
        return 200, found

    def register(self, body: bytes | bytearray) -> None:
        """Store a registration; one of the same role and rank is replaced.

        Raises:
            ValueError: with the reason, if `body` is not a registration.
        """
        with self._parsing:
            registration = parse_registration(body, self._num_ranks)
            answer = make_answer(registration)
        with self._lock:
            self._answers[registration.role, registration.world_rank] = answer
            self._controls[registration.role, registration.world_rank] = registration.control
        logger.debug("rank %d of the %s model has registered", registration.world_rank, registration.role)

    def forget(self, role: str) -> None:
        """Drop what all ranks have registered for a role: nobody shall come for it any more."""
        with self._lock:
            for directory in (self._answers, self._controls):
                for key in [key for key in directory if key[0] == role]:
                    del directory[key]

    def suspend(self, role: str, *, asleep: bool = False) -> None:
        """Send nobody to the weights of a role for now: its ranks change them, one a little later than the other.

        Args:
            asleep: they are put away, and who asks does not wait for them.
        """
        reason = f"the weights of the {role} model {ASLEEP if asleep else BEING_CHANGED}"
        with self._lock:
            self._suspended[role] = 409 if asleep else 503, reason

    def resume(self, role: str) -> None:
        """All ranks have registered what they have now."""
        with self._lock:
            self._suspended.pop(role, None)

    def suspension(self, role: str) -> tuple[int, str] | None:
        """HTTP status and reason for who asks for weights of the role; None if they can be had."""
        with self._lock:
            return self._suspended.get(role)

    def refusal(self, headers: Message, *, registering: bool) -> tuple[int, str] | None:
        """HTTP status and reason if a request with these headers may not ask, or register; None if it may."""
        keys = self._registering_keys if registering else self._asking_keys
        if not keys:
            foreign = self.origins.refusal(headers.get("Host"), headers.get("Origin"), headers.get("Sec-Fetch-Site"))
            return None if foreign is None else (403, foreign)
        given = headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if any([hmac.compare_digest(given, key) for key in keys]):
            return None
        if registering:
            return 401, "registering needs the admin key (--admin-api-key), or --api-key if there is no other"
        return 401, "asking needs the instance's key (--api-key)"


def _keys(*keys: str | None) -> tuple[bytes, ...]:
    return tuple(f"Bearer {key}".encode() for key in keys if key)


class _Connection:
    """One connection, which a thread serves."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.is_waiting = True  # for the end of the headers
        self.is_cut_off = False  # its thread will find out
        self.num_held_bytes = 0
        self.deadline = time.monotonic() + HEADER_TIMEOUT_S

    def cut_off(self) -> None:
        self.is_cut_off = True
        with contextlib.suppress(OSError):  # it has gone by itself
            self.socket.shutdown(socket.SHUT_RDWR)


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = address_family(host)
        self._connections: dict[socket.socket, _Connection] = {}  # the oldest first
        self._lock = threading.Lock()
        self._num_held_bytes = 0
        self._log_filter = Seldom(LOG_PERIOD_S, FULL, NO_FILES)
        super().__init__((host, port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            num_connections = sum(not connection.is_cut_off for connection in self._connections.values())
            self._connections[request] = _Connection(request)
        if num_connections >= MAX_CONNECTIONS:
            self._log(FULL + ", of which the oldest is cut off", num_connections)
            self._cut_off_one()
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:  # no more threads
            self._log(NO_FILES + ": %s", error)
            self.shutdown_request(request)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:  # for want of files, in most cases
            self._log(NO_FILES + ": %s", error)
            self._cut_off_one()
            time.sleep(0.1)
            raise

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            connection = self._connections.pop(request, None)
            if connection is not None:
                self._num_held_bytes -= connection.num_held_bytes
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called by the loop, every POLL_S: cut off who has had its time."""
        now = time.monotonic()
        with self._lock:
            late = [connection for connection in self._connections.values() if connection.deadline < now]
        for connection in late:
            connection.cut_off()

    def has_headers(self, request: socket.socket) -> None:
        """The headers have come: now is the time of the body and the answer."""
        with self._lock:
            connection = self._connections.get(request)
            if connection is not None:
                connection.is_waiting = False
                connection.deadline = time.monotonic() + 2 * REQUEST_TIMEOUT_S

    def hold(self, request: socket.socket, num_bytes: int) -> bool:
        """Count so many bytes as held for a request in all; False if all requests together would hold too many."""
        with self._lock:
            connection = self._connections.get(request)
            wanted = max(0, num_bytes - UNCOUNTED_BYTES)
            if connection is None or wanted <= connection.num_held_bytes:
                return True
            more = wanted - connection.num_held_bytes
            if self._num_held_bytes + more > MAX_ALL_BODIES_BYTES:
                return False
            self._num_held_bytes += more
            connection.num_held_bytes = wanted
            return True

    def _cut_off_one(self) -> None:
        """The oldest that waits for headers, or else the oldest of all."""
        with self._lock:
            open_ones = [connection for connection in self._connections.values() if not connection.is_cut_off]
            chosen = next((connection for connection in open_ones if connection.is_waiting), None)
            chosen = chosen or next(iter(open_ones), None)
        if chosen is not None:
            chosen.cut_off()

    def _log(self, message: str, *args: object) -> None:
        record = logger.makeRecord(logger.name, logging.WARNING, __file__, 0, message, args, None)
        if self._log_filter.filter(record):
            logger.handle(record)

    def server_bind(self) -> None:
        # Without HTTPServer's look-up of the host's name, which can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, _request: Any, client_address: Any) -> None:
        logger.debug("a request from %s broke off", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    directory: EngineInfoBootstrapServer
    server: _HTTPServer
    timeout = REQUEST_TIMEOUT_S

    def parse_request(self) -> bool:
        is_sound = super().parse_request()
        self.server.has_headers(self.connection)
        return is_sound

    def do_GET(self) -> None:
        path, _, query_text = self.path.partition("?")
        if path == "/health":
            self._send(200, b"OK", "text/plain; charset=utf-8")
        elif path == "/get_transfer_engine_info":
            refusal = self.directory.refusal(self.headers, registering=False)
            if refusal is not None:
                self._send(refusal[0], _error(refusal[1]))
                return
            try:
                query = parse_qs(query_text, keep_blank_values=True, max_num_fields=16)
            except ValueError as error:
                self._send(400, _error(f"the query can't be used: {error}"))
                return
            self._send(*self.directory.answer(_single(query, "rank"), _single(query, "role")))
        else:
            self._send(404, _error(f"there is no {path:.200} here"))

    def do_PUT(self) -> None:
        path = self.path.partition("?")[0]
        if path != "/register_transfer_engine_info":
            self._send(404, _error(f"there is no {path:.200} here"))
        elif (refusal := self.directory.refusal(self.headers, registering=True)) is not None:
            self._send(refusal[0], _error(refusal[1]))
        else:
            length = self.headers.get("Content-Length", "")
            if not re.fullmatch(r"[0-9]{1,18}", length):
                self._send(411, _error("Content-Length is missing or no number"))
            elif int(length) > MAX_REGISTRATION_BYTES:
                self._send(413, _error(f"a registration may have {MAX_REGISTRATION_BYTES} bytes, not {length}"))
            else:
                self._register(int(length))

    def _register(self, length: int) -> None:
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        body = bytearray()
        while len(body) < length:
            chunk = self.rfile.read1(min(READ_BYTES, length - len(body)))
            if not chunk or time.monotonic() > deadline:
                self._send(400, _error(f"the body ended after {len(body)} of {length} bytes"))
                return
            body += chunk
            if not self.server.hold(self.connection, len(body)):
                self._send(503, _error("the registrations that are being read take too much memory now"))
                return
        try:
            self.directory.register(body)
        except ValueError as error:
            self._send(400, _error(str(error)))
        else:
            self._send(200, b"OK", "text/plain; charset=utf-8")

    def _send(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        logger.debug("%s %s", self.address_string(), format % args)


def _single(query: dict[str, list[str]], name: str) -> str | None:
    values = query.get(name, [])
    return ",".join(values) if values else None


def _error(reason: str) -> bytes:
    return msgspec.json.encode({"detail": reason})
