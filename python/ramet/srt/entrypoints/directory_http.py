"""Owns the HTTP side of a directory of weights: connections and what each may cost, and the requests of ranks."""

import contextlib
import logging
import re
import socket
import socketserver
import sys
import threading
import time
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs

import msgspec

from ramet.srt.observability.logs import Seldom
from ramet.srt.utils.net import address_family
from ramet.srt.weights.registration import MAX_REGISTRATION_BYTES

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


class Directory(Protocol):
    """What ranks have registered."""

    def refusal(self, headers: Message, *, registering: bool) -> tuple[int, str] | None:
        """HTTP status and reason if a request with these headers may not ask, or register; None if it may."""

    def answer(self, rank: str | None, role: str | None) -> tuple[int, bytes]:
        """HTTP status and JSON body for the query parameters of a request."""

    def register(self, body: bytes | bytearray) -> None:
        """Store a registration. Raises ValueError, with the reason, if it is none."""


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


class DirectoryHTTPServer(ThreadingHTTPServer):
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

    def handle_error(self, _request: Any, client_address: Any) -> None:
        """Whoever asked may have gone meanwhile, which is nobody's fault."""
        if isinstance(sys.exception(), OSError):
            logger.debug("%s did not wait for its answer", client_address[0])
        else:
            logger.exception("an answer to %s failed", client_address[0])

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

    def handleerror_body(self, _request: Any, client_address: Any) -> None:
        logger.debug("a request from %s broke off", client_address, exc_info=True)


class DirectoryHandler(BaseHTTPRequestHandler):
    directory: Directory
    server: DirectoryHTTPServer
    timeout = REQUEST_TIMEOUT_S
    info_paths: tuple[str, ...] = ()  # other names of the question for a rank

    def parse_request(self) -> bool:
        is_sound = super().parse_request()
        self.server.has_headers(self.connection)
        return is_sound

    def do_GET(self) -> None:
        path, _, query_text = self.path.partition("?")
        if path == "/health":
            self.send(200, b"OK", "text/plain; charset=utf-8")
        elif path in ("/get_transfer_engine_info", *self.info_paths):
            if self.refuses_asking():
                return
            try:
                query = parse_qs(query_text, keep_blank_values=True, max_num_fields=16)
            except ValueError as error:
                self.send(400, error_body(f"the query can't be used: {error}"))
                return
            self.send(*self.directory.answer(_single(query, "rank"), _single(query, "role")))
        else:
            self.send(404, error_body(f"there is no {path:.200} here"))

    def refuses_asking(self) -> bool:
        """Whether a request may not ask, which has been answered then."""
        refusal = self.directory.refusal(self.headers, registering=False)
        if refusal is not None:
            self.send(refusal[0], error_body(refusal[1]))
        return refusal is not None

    def do_PUT(self) -> None:
        path = self.path.partition("?")[0]
        if path != "/register_transfer_engine_info":
            self.send(404, error_body(f"there is no {path:.200} here"))
        elif (refusal := self.directory.refusal(self.headers, registering=True)) is not None:
            self.send(refusal[0], error_body(refusal[1]))
        else:
            self._register()

    def read_body(self) -> bytearray | None:
        """A request's body; None if it can't be taken, which has been answered then."""
        text = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,18}", text):
            self.send(411, error_body("Content-Length is missing or no number"))
            return None
        if (length := int(text)) > MAX_REGISTRATION_BYTES:
            self.send(413, error_body(f"a registration may have {MAX_REGISTRATION_BYTES} bytes, not {length}"))
            return None
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        body = bytearray()
        while len(body) < length:
            chunk = self.rfile.read1(min(READ_BYTES, length - len(body)))
            if not chunk or time.monotonic() > deadline:
                self.send(400, error_body(f"the body ended after {len(body)} of {length} bytes"))
                return None
            body += chunk
            if not self.server.hold(self.connection, len(body)):
                self.send(503, error_body("the registrations that are being read take too much memory now"))
                return None
        return body

    def _register(self) -> None:
        body = self.read_body()
        if body is None:
            return
        try:
            self.directory.register(body)
        except ValueError as error:
            self.send(400, error_body(str(error)))
        else:
            self.send(200, b"OK", "text/plain; charset=utf-8")

    def send(self, status: int, body: bytes, content_type: str = "application/json") -> None:
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


def error_body(reason: str) -> bytes:
    return msgspec.json.encode({"detail": reason})
