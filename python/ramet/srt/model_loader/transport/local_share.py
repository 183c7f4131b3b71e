"""Owns handing an arena's memory to another process of the same user on the same host. Maps and copies nothing.

Host memory goes as a file descriptor (unix(7), SCM_RIGHTS) and outlives its process. A GPU's memory goes as a CUDA IPC
handle, or as a descriptor too, and is read while the connection stands: so both sides know when the other one is gone.
"""

import logging
import os
import socket
import threading

import msgspec

from ramet.srt.model_loader.arena.base import LentFile, LentMemory, MemoryShare, SharedFile, WeightArena
from ramet.srt.utils.local_socket import ConnectionThreads, listen_on_abstract_name, peer_uid
from ramet.srt.weights.manifest import layout_digest

logger = logging.getLogger(__name__)

MESSAGE_BYTES = 4096
CONNECTION_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 10.0  # for readers of a GPU's memory; a copy takes fractions of a second


class ShareRequest(msgspec.Struct, frozen=True):
    """What a client sends: the layout that the seed's manifest announced."""

    layout_digest: str


class ShareReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What it gets: a handle, or the attached file descriptor, unless there is an error."""

    error: str = ""
    cuda_ipc_handle: bytes = b""
    offset: int = 0  # of the arena in the memory that the handle opens
    gpu_nbytes: int = 0  # of a GPU's memory, which the attached descriptor is then


class LocalShareServer:
    """A Unix socket that is served by a thread; each connection is one request.

    Its name is in the abstract namespace (unix(7)): it reaches as far as the network namespace, leaves nothing
    behind when the process is killed, and who may connect is decided by the kernel's word on the peer's user.
    """

    def __init__(self, arena: WeightArena) -> None:
        self._arena = arena
        self._readers: set[socket.socket] = set()  # connections over which a GPU's memory is being read
        self._no_readers = threading.Condition()
        self._digest = layout_digest(arena.manifest)
        listener, self.name = listen_on_abstract_name("ramet-weights", socket.SOCK_SEQPACKET)
        self._connections = ConnectionThreads(listener, self._answer, "local-share")

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stop handing the memory out. Those who have mapped it keep it; those who read it get time to finish."""
        self._connections.close()
        with self._no_readers:
            if not self._no_readers.wait_for(lambda: not self._readers, timeout_s):
                logger.warning("%d clients were still reading the weights after %g s", len(self._readers), timeout_s)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(CONNECTION_TIMEOUT_S)
        try:
            uid = peer_uid(connection)
            request = msgspec.msgpack.decode(connection.recv(MESSAGE_BYTES), type=ShareRequest)
            if uid != os.geteuid():
                reply = ShareReply(error=f"user {uid} may not have the memory of user {os.geteuid()}")
            elif request.layout_digest != self._digest:
                reply = ShareReply(error="another layout is in this memory")
            else:
                return self._hand_over(connection)
            connection.send(msgspec.msgpack.encode(reply))
        except (OSError, ValueError) as error:
            logger.debug("a local client went away: %s", error)

    def _hand_over(self, connection: socket.socket) -> None:
        try:
            share = self._arena.share()
        except OSError as error:
            connection.send(msgspec.msgpack.encode(ShareReply(error=str(error))))
            return
        match share:
            case SharedFile(fd):
                socket.send_fds(connection, [msgspec.msgpack.encode(ShareReply())], [fd])
            case LentMemory(handle, offset):
                self._lend(connection, ShareReply(cuda_ipc_handle=handle, offset=offset), [])
            case LentFile(fd, nbytes):
                try:
                    self._lend(connection, ShareReply(gpu_nbytes=nbytes), [fd])
                finally:
                    os.close(fd)

    def _lend(self, connection: socket.socket, reply: ShareReply, fds: list[int]) -> None:
        """Send a handle and wait until the client has closed the connection."""
        with self._no_readers:
            self._readers.add(connection)
        try:
            socket.send_fds(connection, [msgspec.msgpack.encode(reply)], fds)
            connection.settimeout(None)  # as long as the client lives: its end ends the connection
            connection.recv(1)
        finally:
            with self._no_readers:
                self._readers.discard(connection)
                self._no_readers.notify_all()


class OfferedMemory:
    """A seed's memory. Use as a context manager: descriptor and connection are closed at the end."""

    def __init__(self, connection: socket.socket, share: MemoryShare) -> None:
        connection.setblocking(False)
        self._connection = connection
        self.share = share

    def __enter__(self) -> "OfferedMemory":
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self.share, SharedFile | LentFile):
            os.close(self.share.fd)
        self._connection.close()

    def seed_is_alive(self) -> bool:
        """Whether the seed still holds the connection."""
        try:
            return bool(self._connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False


def request_memory(name: str, digest: str, timeout_s: float) -> OfferedMemory:
    """A seed's memory; the caller closes it.

    Raises:
        OSError: if the seed can't be reached in time.
        ValueError: if it refuses, or is not of this user.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds: list[int] = []
    try:
        connection.settimeout(timeout_s)
        connection.connect("\0" + name)
        uid = peer_uid(connection)
        if uid != os.geteuid():
            raise ValueError(f"the socket belongs to user {uid}, not to {os.geteuid()}")
        connection.send(msgspec.msgpack.encode(ShareRequest(layout_digest=digest)))
        data, fds, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1)
        reply = msgspec.msgpack.decode(data, type=ShareReply)
        if reply.error or not (fds or reply.cuda_ipc_handle):
            raise ValueError(reply.error or "the seed sent no memory")
        for fd in fds:
            os.set_inheritable(fd, False)
        return OfferedMemory(connection, _shared(reply, fds))
    except BaseException:
        for fd in fds:
            os.close(fd)
        connection.close()
        raise


def _shared(reply: ShareReply, fds: list[int]) -> MemoryShare:
    if not fds:
        return LentMemory(reply.cuda_ipc_handle, reply.offset)
    return LentFile(fds[0], reply.gpu_nbytes) if reply.gpu_nbytes else SharedFile(fds[0])
