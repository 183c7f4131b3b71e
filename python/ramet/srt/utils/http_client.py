"""Owns one small HTTP request with a hard deadline and a bounded answer. For servers that may be slow or hostile.

Importing it imports requests: whoever needs it imports it where it is used, so that no start waits for it.
"""

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

READ_BYTES = 1 << 20

_watch: ContextVar[Callable[[socket.socket], None]] = ContextVar("watch")  # told of each connection of the exchange


def http_request(
    url: str,
    method: str,
    *,
    timeout_s: float,
    max_nbytes: int,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    ca_certs: str | None = None,
) -> tuple[int, bytes]:
    """Status and body of the answer. Proxies and redirects are not followed, whatever the environment says.

    Args:
        url: http:// or https://.
        timeout_s: for the whole exchange, however slowly the bytes trickle in.
        ca_certs: file with the certificates (PEM) that an https server's is verified with; the system's for None.

    Raises:
        TimeoutError: if it is not done by then.
        OSError: if the connection fails, or the server's certificate can't be verified.
        ValueError: if the URL is none, or the answer is not HTTP or longer than `max_nbytes`.
    """
    deadline = time.monotonic() + timeout_s
    with _shutting_down_at(deadline), _Session() as session:
        try:
            response = session.request(
                method,
                url,
                data=body,
                headers=dict(headers or {}),
                timeout=timeout_s,
                allow_redirects=False,
                stream=True,
                verify=ca_certs or _system_certificates(),
            )
            with response:
                answer = _read(response.raw, max_nbytes)
            if time.monotonic() >= deadline:
                raise TimeoutError
        except (OSError, HTTPError, ValueError) as error:
            cause = _cause(error)
            if isinstance(cause, TimeoutError) or time.monotonic() >= deadline:
                raise TimeoutError(f"no complete answer within {round(timeout_s, 1):g} s") from error
            raise cause from None  # the libraries' own words are long
    return response.status_code, answer


def _read(raw: Any, max_nbytes: int) -> bytes:
    """The body of an answer, as it was sent. `raw` is urllib3's response."""
    raw.enforce_content_length = False  # said in our words
    answer = bytearray()
    while chunk := raw.read(READ_BYTES, decode_content=False):
        answer += chunk
        if len(answer) > max_nbytes:
            raise ValueError(f"the answer is longer than {max_nbytes} bytes")
    if raw.length_remaining:
        raise ValueError(f"the answer ended {raw.length_remaining} bytes early")
    return bytes(answer)


def _cause(error: Exception) -> Exception:
    """What went wrong beneath requests and urllib3, which wrap it several times."""
    queue: list[object] = [error]
    for one in queue:  # grows meanwhile: the nearest first
        if isinstance(one, http.client.HTTPException) and not isinstance(one, OSError):
            return ValueError(f"the answer is not HTTP: {one!r}")
        if isinstance(one, ValueError):
            return ValueError(str(one)) if isinstance(one, requests.RequestException) else one
        if isinstance(one, OSError) and not isinstance(one, requests.RequestException):
            return one
        if isinstance(one, requests.RequestException | HTTPError):
            queue += [one.__cause__, one.__context__, *one.args]
    return OSError(str(error))


def _system_certificates() -> str | bool:
    """Where the system keeps its CAs, for OpenSSL; requests' own ones where there is no such place."""
    paths = ssl.get_default_verify_paths()
    return paths.cafile or paths.capath or True


@contextlib.contextmanager
def _shutting_down_at(deadline: float) -> Iterator[None]:
    """Shut connections down at the deadline: a timeout per read alone would let a trickle go on for ever.

    At the end they are closed. urllib3 leaves that to the garbage collector, and who keeps an error keeps its frames.
    """
    connections: list[socket.socket] = []
    timers: list[threading.Timer] = []

    def watch(connection: socket.socket) -> None:
        connections.append(connection)
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), _shut_down, (connection,))
        timer.daemon = True
        timer.start()
        timers.append(timer)

    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
        for timer in timers:
            timer.cancel()
        for connection in connections:
            connection.close()


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # TLS's own would take its state from a reader's hands


class _Connection(HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _watch.get()(self.sock)


class _TlsConnection(HTTPSConnection):
    def connect(self) -> None:
        super().connect()  # the handshake as a whole has the time limit of a connection
        _watch.get()(self.sock)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}


class _Session(requests.Session):
    """One request's: nothing is kept, and nothing is taken from the environment (proxies, .netrc, certificates)."""

    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False
        self.headers.clear()
        self.headers.update({"User-Agent": "ramet", "Accept-Encoding": "identity", "Connection": "close"})
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter())

    def get_redirect_target(self, _response: requests.Response) -> None:
        """None: even to say where a redirect would lead, requests reads the whole body, without bounds."""
