"""Owns handing an arena's memory file to another process of the same user on the same host. Maps and copies nothing."""

import contextlib
import logging
import os
import secrets
import socket
import struct
import threading

import msgspec

from ramet.srt.model_loader.weight_arena import WeightArena
from ramet.srt.model_loader.weight_manifest import layout_digest

logger = logging.getLogger(__name__)

MESSAGE_BYTES = 4096
CONNECTION_TIMEOUT_S = 5.0
_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


class ShareRequest(msgspec.Struct, frozen=True):
    """What a client sends: the layout that the seed's manifest announced."""

    layout_digest: str


class ShareReply(msgspec.Struct, frozen=True):
    """What it gets, with the file descriptor attached unless there is an error."""

    error: str = ""


class LocalShareServer:
    """A Unix socket that is served by a thread; each connection is one request.

    Its name is in the abstract namespace (unix(7)): it reaches as far as the network namespace, leaves nothing
    behind when the process is killed, and who may connect is decided by the kernel's word on the peer's user.
    """

    def __init__(self, arena: WeightArena) -> None:
        self._arena = arena
        self._digest = layout_digest(arena.manifest)
        self.name = f"ramet-weights-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.bind("\0" + self.name)
            self._socket.listen(64)
        except OSError:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="local-share", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop handing the memory out; those who have it keep it."""
        with contextlib.suppress(OSError):  # closed before
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # shut down
                return
            threading.Thread(target=self._answer, args=(connection,), name="local-share", daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(CONNECTION_TIMEOUT_S)
            try:
                uid = peer_uid(connection)
                request = msgspec.msgpack.decode(connection.recv(MESSAGE_BYTES), type=ShareRequest)
                if uid != os.geteuid():
                    reply = ShareReply(error=f"user {uid} may not have the memory of user {os.geteuid()}")
                elif request.layout_digest != self._digest:
                    reply = ShareReply(error="another layout is in this memory")
                else:
                    reply = ShareReply()
                fds = [] if reply.error else [self._arena.fd]
                socket.send_fds(connection, [msgspec.msgpack.encode(reply)], fds)
            except (OSError, ValueError) as error:
                logger.debug("a local client went away: %s", error)


def request_memory(name: str, digest: str, timeout_s: float) -> int:
    """The descriptor of a seed's memory file; the caller closes it.

    Raises:
        OSError: if the seed can't be reached in time.
        ValueError: if it refuses, or is not of this user.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(timeout_s)
        connection.connect("\0" + name)
        uid = peer_uid(connection)
        if uid != os.geteuid():
            raise ValueError(f"the socket belongs to user {uid}, not to {os.geteuid()}")
        connection.send(msgspec.msgpack.encode(ShareRequest(layout_digest=digest)))
        data, fds, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1)
        try:
            reply = msgspec.msgpack.decode(data, type=ShareReply)
            if reply.error or not fds:
                raise ValueError(reply.error or "the seed sent no memory")
        except ValueError:
            for fd in fds:
                os.close(fd)
            raise
        os.set_inheritable(fds[0], False)
        return fds[0]


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end of a connected Unix socket, as the kernel knows it."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return _UCRED.unpack(data)[1]
