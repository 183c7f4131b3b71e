"""Owns a rank's side of a receiver process: starting it, what it receives, and why it does not."""

import contextlib
import mmap
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Iterator

import msgspec
import torch

from ramet.srt.distributed.receiver_messages import MESSAGE_BYTES, Place, Receive, ReceiverReply, ReceiverRequest
from ramet.srt.utils import host_memory
from ramet.srt.utils.helper_process import describe_end, start_python

MODULE = "ramet.srt.distributed.receiver_process"
START_TIMEOUT_S = 60.0  # of Python and torch
GRACE_S = 3.0  # for the process to say that a time limit is over
GUARD_BYTES = 8
LARGER = "Received data size doesn't match expected size"  # gloo's last words
LEFT = "the group was left meanwhile"


class GlooReceiver:
    """A member of a trainer's gloo group: what rank 0 broadcasts comes into host memory.

    One broadcast at a time. After a failure the group is of no use any more, and is to be closed.
    """

    def __init__(self) -> None:
        """Start the process; `join` is the first thing that it does. `close` ends it at any time, from any thread."""
        self._last_words = os.fdopen(os.memfd_create("ramet-receiver", os.MFD_CLOEXEC), "rb", buffering=0)
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = start_python(
                MODULE, theirs.fileno(), sees_gpus=False, stderr=self._last_words.fileno(), TORCH_CPP_LOG_LEVEL="ERROR"
            )
        self._turn = threading.Lock()  # of whoever asks
        self._is_closed = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def join(self, place: Place) -> None:
        """Meet the trainer and the other members; once.

        Raises:
            OSError: if they don't come in time, or the group is left meanwhile.
        """
        self._ask(None, [], START_TIMEOUT_S)
        self._ask(place, [], place.timeout_s)

    def receive(self, nbytes: int, timeout_s: float) -> torch.Tensor:
        """What the trainer broadcasts next: uint8, [nbytes], nbytes > 0.

        Raises:
            OSError: if it has gone, sends nothing in time, or something of another size.
            MemoryError: if there is not enough for so much.
        """
        available = host_memory.available_memory_nbytes()
        if nbytes > available:
            raise MemoryError(f"{nbytes / 1e9:.2f} GB are to come at once, but only {available / 1e9:.2f} GB are free")
        fd = host_memory.create_memfd("ramet-receive", nbytes)
        try:
            content = torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)
            with guarded(content):
                self._ask(Receive(nbytes, timeout_s), [fd], timeout_s)
        finally:
            os.close(fd)
        return content

    def close(self) -> None:
        """End the process, whatever it waits for. May be called again."""
        self._is_closed = True
        self._process.kill()
        self._process.wait()
        with self._turn:
            self._connection.close()
            self._last_words.close()
            if self._process.stdin is not None:
                self._process.stdin.close()

    def _ask(self, request: ReceiverRequest | None, fds: list[int], timeout_s: float) -> None:
        """Args:
        request: None: wait for the process to start.
        """
        with self._turn:
            data = b"" if self._is_closed else self._exchange(request, fds, timeout_s)
            if not data:
                raise OSError(LEFT if self._is_closed else self._describe_end())
        if error := msgspec.msgpack.decode(data, type=ReceiverReply).error:
            raise OSError(error)

    def _exchange(self, request: ReceiverRequest | None, fds: list[int], timeout_s: float) -> bytes:
        """The reply; b"" if the process has ended."""
        self._connection.settimeout(timeout_s + GRACE_S)
        try:
            if request is not None:
                socket.send_fds(self._connection, [msgspec.msgpack.encode(request)], fds)
            return self._connection.recv(MESSAGE_BYTES)
        except TimeoutError:
            raise OSError(f"no progress within {timeout_s:g} s") from None
        except (BrokenPipeError, ConnectionResetError):
            return b""

    def _describe_end(self) -> str:
        """Why the process has ended by itself."""
        try:
            code = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:  # it has only closed the connection
            self._process.kill()
            code = self._process.wait()
        words = os.pread(self._last_words.fileno(), 1 << 20, 0).decode(errors="replace")
        if LARGER in words:
            return "the trainer has sent more bytes than were announced"
        return " ".join([f"the receiver process {describe_end(code)}", *words.split()[-40:]])


@contextlib.contextmanager
def guarded(content: torch.Tensor) -> Iterator[None]:
    """Around receiving into a tensor, uint8, [nbytes]: raises OSError if less came than it has room for.

    Neither gloo nor NCCL says so. The last bytes are random before, and must not be the same ones afterwards.
    """
    guard = torch.frombuffer(bytearray(secrets.token_bytes(GUARD_BYTES)), dtype=torch.uint8)
    tail = content[-GUARD_BYTES:]
    tail.copy_(guard[: len(tail)])
    yield
    if len(tail) == GUARD_BYTES and torch.equal(tail.cpu(), guard):
        raise OSError("the trainer has sent fewer bytes than were announced")
