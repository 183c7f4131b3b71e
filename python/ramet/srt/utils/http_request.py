"""Owns one small HTTP request with a hard deadline and a bounded answer. For servers that may be slow or hostile."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Mapping

READ_BYTES = 1 << 20


def http_request(
    host: str,
    port: int,
    method: str,
    path: str,
    *,
    timeout_s: float,
    max_nbytes: int,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Status and body of the answer. Proxies and redirects are not followed.

    Args:
        timeout_s: for the whole exchange, however slowly the bytes trickle in.

    Raises:
        TimeoutError: if it is not done by then.
        OSError: if the connection fails.
        ValueError: if the answer is not HTTP, or longer than `max_nbytes`.
    """
    deadline = time.monotonic() + timeout_s
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.connect()
        with _closing_at(connection.sock, deadline):
            connection.request(method, path, body=body, headers=dict(headers or {}) | {"Connection": "close"})
            response = connection.getresponse()
            answer = bytearray()
            while chunk := response.read(READ_BYTES):
                answer += chunk
                if len(answer) > max_nbytes:
                    raise ValueError(f"the answer is longer than {max_nbytes} bytes")
        if time.monotonic() >= deadline:
            raise TimeoutError
        if response.length:
            raise ValueError(f"the answer ended {response.length} bytes early")
        return response.status, bytes(answer)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
            raise TimeoutError(f"no complete answer within {round(timeout_s, 1):g} s") from error
        if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
            raise ValueError(f"the answer is not HTTP: {error!r}") from error
        raise
    finally:
        connection.close()


@contextlib.contextmanager
def _closing_at(sock: socket.socket, deadline: float):
    """Shut the connection down at the deadline: a timeout per read alone would let a trickle go on for ever."""

    def shut_down() -> None:
        with contextlib.suppress(OSError):  # closed already
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), shut_down)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
