"""Owns Mooncake's TransferEngine: starting it, registering memory, and reads that can be given up."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from ramet.srt.environ import envs
from ramet.srt.weights.errors import WeightTransferError

RDMA_DEVICES = "/sys/class/infiniband"
HARMLESS_LOG = (b"Logging before InitGoogleLogging() is written", b"Local segment descriptor not found")
HANDSHAKE = "P2PHANDSHAKE"  # the engines find each other by session id, without a metadata server


class MooncakeEngine:
    """One TransferEngine of this process.

    It is never destroyed: its destructor holds the GIL for a second, and waits for reads that are stuck.
    """

    def __init__(self, host: str, rank: int) -> None:
        """
        Args:
            host: address of this machine by which the other side reaches it.

        Raises:
            WeightTransferError: if Mooncake is not installed or does not start.
        """
        self.protocol = choose_protocol()
        # Mooncake logs to stderr, past Python's logging; its warnings say nothing that a return code does not.
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise WeightTransferError("start", rank, host, f"Mooncake can't be used: {error}") from error
        self._key = host
        self._rank = rank
        self._engine: Any = TransferEngine()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._engine))
        with _without_harmless_log():
            code = self._engine.initialize(host, HANDSHAKE, self.protocol, envs.MOONCAKE_DEVICE.get())
        if code != 0:
            raise WeightTransferError("start", rank, host, f"Mooncake with the protocol {self.protocol} answers {code}")
        self.session_id = f"{host}:{self._engine.get_rpc_port()}"

    @classmethod
    def acquire(cls, host: str, rank: int) -> "MooncakeEngine":
        """The process's engine for an address: the one that a client has received with also serves what it offers.

        Raises:
            WeightTransferError: if Mooncake is not installed or does not start.
        """
        with _lock:
            if host not in _engines:
                _engines[host] = cls(host, rank)
            return _engines[host]

    def register(self, address: int, nbytes: int) -> None:
        """Make memory readable for others, and usable as the target of reads.

        Raises:
            WeightTransferError: if Mooncake refuses.
        """
        code = self._engine.register_memory(address, nbytes)
        if code != 0:
            raise WeightTransferError("register", self._rank, self.session_id, f"register_memory answers {code}")

    def unregister(self, address: int) -> None:
        """Withdraw a registration. No read of this process into it may be under way."""
        self._engine.unregister_memory(address)

    def read(
        self, session_id: str, local: Sequence[int], remote: Sequence[int], nbytes: Sequence[int], timeout_s: float
    ) -> None:
        """Read ranges of a peer's registered memory in one batch; none may be empty.

        After an error, ranges of the batch may still be written at any later time.

        Raises:
            WeightTransferError: if it fails, or is not done within `timeout_s`. The engine must be abandoned then.
        """
        results: list[int | BaseException] = []

        def call() -> None:
            try:
                results.append(
                    self._engine.batch_transfer_sync_read(session_id, list(local), list(remote), list(nbytes))
                )
            except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
                results.append(error)

        # The call releases the GIL but can't be interrupted: a daemon thread can be left behind in it.
        thread = threading.Thread(target=call, name="mooncake-read", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if not results:
            raise WeightTransferError("transfer", self._rank, session_id, f"no progress within {timeout_s:g} s")
        result = results[0]
        if isinstance(result, BaseException):
            raise WeightTransferError("transfer", self._rank, session_id, result) from result
        if result < 0:
            raise WeightTransferError("transfer", self._rank, session_id, f"Mooncake answers {result}")

    def abandon(self) -> None:
        """Never use the engine again, after a read that failed: it may still be inside of it."""
        with _lock:
            if _engines.get(self._key) is self:
                del _engines[self._key]


_engines: dict[str, MooncakeEngine] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def _without_harmless_log() -> Iterator[None]:
    """Hold stderr back for a moment, and let it pass without the lines that every good start writes as errors."""
    held, stderr = os.memfd_create("mooncake-log", os.MFD_CLOEXEC), os.dup(2)
    os.dup2(held, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        lines = os.pread(held, os.fstat(held).st_size, 0).splitlines(keepends=True)
        os.write(2, b"".join(line for line in lines if not any(text in line for text in HARMLESS_LOG)))
        os.close(held)
        os.close(stderr)


def choose_protocol() -> str:
    """MOONCAKE_PROTOCOL, or rdma where there is a device for it, else tcp."""
    chosen = envs.MOONCAKE_PROTOCOL.get()
    if chosen:
        return chosen
    return "rdma" if os.path.isdir(RDMA_DEVICES) and os.listdir(RDMA_DEVICES) else "tcp"
