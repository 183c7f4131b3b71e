"""Owns a rank's side of a transport process: starting it, what it is asked for, and noticing that it has ended.

The process does what Mooncake does, so that a stranger who ends it by what he sends ends one transfer or one offer,
which is made again, and never the instance. See engine_process.py for the other side.
"""

import concurrent.futures
import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Sequence

import msgspec

from ramet.srt.environ import envs
from ramet.srt.model_loader.transport.engine_messages import (
    MESSAGE_BYTES,
    EngineReply,
    EngineRequest,
    Numbered,
    OfferMemory,
    OpenWindow,
    Ping,
    ReadRanges,
    StartEngine,
)
from ramet.srt.model_loader.transport.mooncake_engine import choose_protocol
from ramet.srt.utils.helper_process import describe_end, start_python
from ramet.srt.utils.net import format_address, is_ipv6
from ramet.srt.weights.errors import WeightTransferError

START_TIMEOUT_S = 60.0  # of Python and Mooncake, which take a tenth of a second where nothing else runs
REGISTER_TIMEOUT_S = 120.0  # of memory: a network card pins it page by page
MODULE = "ramet.srt.model_loader.transport.engine_process"


class TransportMissingError(WeightTransferError):
    """Mooncake is not installed."""


class TransportEndedError(WeightTransferError):
    """The process has ended: by itself, or by what somebody has sent to it."""


class TransportProcess:
    """One process with one of Mooncake's engines. `kill` ends it, and with it every read that is under way."""

    def __init__(self, name: str, address: str, rank: int, port: int = 0, gpu_id: int = -1) -> None:
        """
        Args:
            name: of this host, by which the other side reaches it.
            address: the only one to listen on, in numbers.
            port: where the engine must listen, in the place of one that has ended; 0: anywhere.
            gpu_id: the GPU whose memory it will offer, which costs it a CUDA context; -1: none's.

        Raises:
            TransportMissingError: if Mooncake is not installed.
            WeightTransferError: if it does not start.
        """
        self.protocol = choose_protocol()
        self._rank = rank
        self.name = name
        self.address = address
        self._gpu_id = gpu_id
        self._numbers = itertools.count()
        self._waiting: dict[int, concurrent.futures.Future[EngineReply]] = {}
        self._lock = threading.Lock()
        self._end = ""  # what became of the process, once it has ended
        self._on_end: Callable[[str], None] | None = None
        self._is_killed = False
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Mooncake asks the GPUs about each piece of memory: what it sees costs it some hundred megabytes of each.
            self._process = start_python(MODULE, theirs.fileno(), sees_gpus=gpu_id >= 0)
        self._replies = threading.Thread(target=self._receive, name="transport-replies", daemon=True)
        self._replies.start()
        start = StartEngine(name, address, self.protocol, envs.MOONCAKE_DEVICE.get(), port, gpu_id)
        try:
            self.port = self._ask("start", name, start, [], START_TIMEOUT_S).port
        except BaseException:
            self.kill()
            raise
        self.session_id = format_address(name, self.port)

    def successor(self) -> "TransportProcess":
        """Another process in the place of this one, which has ended: with the same session id.

        Raises:
            WeightTransferError: as the constructor does, and if somebody else has the port.
        """
        self.kill()
        return TransportProcess(self.name, self.address, self._rank, self.port, self._gpu_id)

    @property
    def pid(self) -> int:
        return self._process.pid

    def offer_file(self, fd: int, nbytes: int, address: int = 0) -> int:
        """Let others read a file's first bytes, and never write them; returns the address by which they do.

        Args:
            address: the one that it must be; 0: any.

        Raises:
            WeightTransferError: if Mooncake refuses, or the process has ended.
        """
        return self._register(OfferMemory(nbytes, address), [fd])

    def offer_gpu_memory(self, handle: bytes, offset: int, nbytes: int, address: int = 0) -> int:
        """Let others read a GPU's memory, which nobody can keep them from writing to; returns its address there.

        Args:
            handle: of CUDA IPC, as arenas lend their memory.
            address: the one that it must be; 0: any.

        Raises:
            WeightTransferError: if the memory can't be opened there, Mooncake refuses, or the process has ended.
        """
        request = OfferMemory(nbytes, address, cuda_ipc_handle=handle, offset=offset)
        return self._register(request, [])

    def offer_gpu_file(self, fd: int, nbytes: int, gpu_id: int, address: int = 0) -> int:
        """The same of memory that goes by a descriptor.

        Args:
            nbytes: of all of the memory.
        """
        return self._register(OfferMemory(nbytes, address, gpu_id=gpu_id), [fd])

    def open_window(self, fds: Sequence[int], nbytes: Sequence[int]) -> int:
        """Get ready to receive into files, one behind the other; returns the address of the first one's first byte.

        Args:
            nbytes: of each, in whole pages.

        Raises:
            WeightTransferError: if Mooncake refuses, or the process has ended.
        """
        return self._register(OpenWindow(list(nbytes)), fds)

    def _register(self, request: EngineRequest, fds: Sequence[int]) -> int:
        return self._ask("register", self.name, request, fds, REGISTER_TIMEOUT_S).address

    def read(
        self, session_id: str, local: Sequence[int], remote: Sequence[int], nbytes: Sequence[int], timeout_s: float
    ) -> None:
        """Read ranges of a peer's registered memory in one batch; none may be empty.

        After an error, ranges of the batch may still be written until the process is killed.

        Args:
            local: addresses in an open window.

        Raises:
            WeightTransferError: if it fails, is not done within `timeout_s`, or the process has ended.
        """
        request = ReadRanges(session_id, list(local), list(remote), list(nbytes))
        self._ask("transfer", session_id, request, [], timeout_s)

    def ping(self, timeout_s: float) -> None:
        """Raises WeightTransferError if the process does not move within `timeout_s`, or has ended."""
        self._ask("ping", self.name, Ping(), [], timeout_s)

    def abort(self) -> None:
        """End the process as if it had ended by itself: whoever watches it is told."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def watch(self, on_end: Callable[[str], None]) -> None:
        """Have `on_end` called once, in a thread, with what became of the process when it ends without being killed."""
        with self._lock:
            self._on_end = on_end
            has_ended = bool(self._end)
        if has_ended:
            self._tell_end()

    def kill(self) -> None:
        """End the process; nothing that it read or offered goes on. May be called again, from any thread."""
        with self._lock:
            self._is_killed = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        if threading.current_thread() is not self._replies:
            self._replies.join()
        self._connection.close()

    def _ask(self, stage: str, other: str, request: EngineRequest, fds: Sequence[int], timeout_s: float) -> EngineReply:
        number = next(self._numbers)
        future: concurrent.futures.Future[EngineReply] = concurrent.futures.Future()
        with self._lock:
            self._waiting[number] = future
            end = self._end
        try:
            if end:
                raise TransportEndedError(stage, self._rank, other, end)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reader finds out why
                socket.send_fds(self._connection, [msgspec.msgpack.encode(Numbered(number, request))], list(fds))
            reply = future.result(timeout_s)
        except TimeoutError:
            raise WeightTransferError(stage, self._rank, other, f"no progress within {timeout_s:g} s") from None
        except _EndedError as error:
            raise TransportEndedError(stage, self._rank, other, error) from None
        finally:
            with self._lock:
                del self._waiting[number]
        if reply.error:
            kind = TransportMissingError if reply.is_missing else WeightTransferError
            raise kind(stage, self._rank, other, reply.error)
        return reply

    def _receive(self) -> None:
        """Hand replies to those who wait, until the process ends."""
        decoder = msgspec.msgpack.Decoder(EngineReply)
        with contextlib.suppress(ConnectionResetError):
            while data := self._connection.recv(MESSAGE_BYTES):
                reply = decoder.decode(data)
                with self._lock:
                    future = self._waiting.get(reply.number)
                if future is not None:  # else nobody waits any more
                    future.set_result(reply)
        end = f"the transport process {describe_end(self._process.wait())}"
        with self._lock:
            self._end = end
            waiting = list(self._waiting.values())
        for future in waiting:
            if not future.done():
                future.set_exception(_EndedError(end))
        self._tell_end()

    def _tell_end(self) -> None:
        with self._lock:
            on_end, self._on_end = self._on_end, None
            is_killed = self._is_killed
        if on_end is not None and not is_killed:
            on_end(self._end)


class _EndedError(Exception):
    """The process has ended."""


def numeric_address(host: str) -> str:
    """The address, in numbers, of a host of any name; the IPv4 one if it has both.

    Raises:
        OSError: if there is no such host.
    """
    infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]) for info in infos]
    return next((address for address in addresses if not is_ipv6(address)), addresses[0])
