"""Owns the directory of an instance's weights: ranks register here, and clients ask here. Holds no weights itself."""

import hmac
import logging
import re
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from ramet.srt.utils.net import address_family, format_url, host_from_here
from ramet.srt.weights.manifest import ROLES
from ramet.srt.weights.registration import MAX_REGISTRATION_BYTES, ControlAddress, make_answer, parse_registration

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 30.0  # for one whole request
READ_BYTES = 1 << 20


class EngineInfoBootstrapServer:
    """An HTTP server in a thread of the head node, keyed by (model role, world rank). WIRE: see docs/wire.md.

    The port is bound when the object is made, and free again after `close()`.
    """

    def __init__(self, host: str, port: int, *, admin_api_key: str | None = None) -> None:
        """
        Args:
            port: 0 takes a free one; `self.port` says which.
            admin_api_key: the bearer key that registering needs, if any.

        Raises:
            OSError: if the address can't be bound; the message names it and the flag.
        """
        self._admin_api_key = admin_api_key
        self._answers: dict[tuple[str, int], bytes] = {}
        self._controls: dict[tuple[str, int], ControlAddress | None] = {}
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
            target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, name="engine-info-bootstrap", daemon=True
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
        if role not in ROLES:
            return 400, _error(f"role must be one of {', '.join(ROLES)}; got {role!r}")
        found = self.get_json(role, int(rank))
        if found is None:
            return 404, _error(f"rank {int(rank)} of the {role} model has not registered")
        return 200, found

    def register(self, body: bytes) -> None:
        """Store a registration; one of the same role and rank is replaced.

        Raises:
            ValueError: with the reason, if `body` is not a registration.
        """
        registration = parse_registration(body)
        answer = make_answer(registration)
        with self._lock:
            self._answers[registration.role, registration.world_rank] = answer
            self._controls[registration.role, registration.world_rank] = registration.control
        logger.debug("rank %d of the %s model has registered", registration.world_rank, registration.role)

    def is_authorized(self, authorization: str | None) -> bool:
        """Whether an Authorization header allows registering."""
        if self._admin_api_key is None:
            return True
        expected = f"Bearer {self._admin_api_key}".encode()
        return hmac.compare_digest((authorization or "").encode("utf-8", "surrogateescape"), expected)


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = address_family(host)
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        # Without HTTPServer's look-up of the host's name, which can take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, _request: Any, client_address: Any) -> None:
        logger.debug("a request from %s broke off", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    directory: EngineInfoBootstrapServer
    timeout = REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/health":
            self._send(200, b"OK", "text/plain; charset=utf-8")
        elif url.path == "/get_transfer_engine_info":
            query = parse_qs(url.query, keep_blank_values=True)
            self._send(*self.directory.answer(_single(query, "rank"), _single(query, "role")))
        else:
            self._send(404, _error(f"there is no {url.path} here"))

    def do_PUT(self) -> None:
        if urlsplit(self.path).path != "/register_transfer_engine_info":
            self._send(404, _error(f"there is no {urlsplit(self.path).path} here"))
        elif not self.directory.is_authorized(self.headers.get("Authorization")):
            self._send(401, _error("registering needs the admin key (--admin-api-key)"))
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
        try:
            self.directory.register(bytes(body))
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
