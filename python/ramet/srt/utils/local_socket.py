"""Owns what servers on sockets of one host share: an abstract Unix socket, the loop that answers, the peer's user."""

import contextlib
import logging
import secrets
import socket
import struct
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

RETRY_PERIOD_S = 0.5
MAX_CONNECTIONS = 256  # each has a thread
_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end of a connected Unix socket, as the kernel knows it."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return _UCRED.unpack(data)[1]


def listen_on_abstract_name(prefix: str, kind: int) -> tuple[socket.socket, str]:
    """A listening Unix socket in the abstract namespace, of which a killed process leaves nothing, and its name.

    Args:
        kind: SOCK_STREAM or SOCK_SEQPACKET.
    """
    name = f"{prefix}-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, kind)
    try:
        listener.bind("\0" + name)
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    return listener, name


class ConnectionThreads:
    """Answers each connection to a listening socket in a thread of its own."""

    def __init__(self, listener: socket.socket, answer: Callable[[socket.socket], None], name: str) -> None:
        self._listener = listener
        self._answer = answer
        self._name = name
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._num_open = 0
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more connections; those that there are go on."""
        self._closing.set()
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
                if self._num_open >= MAX_CONNECTIONS:
                    connection.close()
                    raise OSError(f"{self._num_open} others are open")
                self._start(connection)
            except (OSError, RuntimeError) as error:  # too many files or threads, for now; or shut down
                if not self._closing.wait(RETRY_PERIOD_S):
                    logger.warning("%s can't take a connection: %s", self._name, error)

    def _start(self, connection: socket.socket) -> None:
        with self._lock:
            self._num_open += 1
        try:
            threading.Thread(target=self._serve, args=(connection,), name=self._name, daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._num_open -= 1
            connection.close()
            raise

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._answer(connection)
        finally:
            with self._lock:
                self._num_open -= 1
