"""Owns Mooncake's TransferEngine: starting it, one registration, and reads that can be given up."""

import ctypes
import os
import threading
from collections.abc import Sequence
from typing import Any

from ramet.srt.environ import envs
from ramet.srt.model_loader.errors import WeightTransferError

RDMA_DEVICES = "/sys/class/infiniband"
HANDSHAKE = "P2PHANDSHAKE"  # the engines find each other by session id, without a metadata server


class MooncakeEngine:
    """One TransferEngine with one registered range of memory. WIRE.md's traps are dealt with in here."""

    def __init__(self, host: str, rank: int) -> None:
        """
        Args:
            host: address of this machine by which the other side reaches it.

        Raises:
            WeightTransferError: if Mooncake is not installed or does not start.
        """
        protocol = choose_protocol()
        # Mooncake logs to stderr, past Python's logging; its warnings say nothing that a return code does not.
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise WeightTransferError("start", rank, host, f"Mooncake can't be used: {error}") from error
        self._rank = rank
        self._engine: Any = TransferEngine()
        code = self._engine.initialize(host, HANDSHAKE, protocol, envs.MOONCAKE_DEVICE.get())
        if code != 0:
            raise WeightTransferError("start", rank, host, f"Mooncake with the protocol {protocol} answers {code}")
        self.session_id = f"{host}:{self._engine.get_rpc_port()}"
        self._registered: int | None = None

    def register(self, address: int, nbytes: int) -> None:
        """Make memory readable for others, and usable as the target of reads.

        Raises:
            WeightTransferError: if Mooncake refuses.
        """
        code = self._engine.register_memory(address, nbytes)
        if code != 0:
            raise WeightTransferError("register", self._rank, self.session_id, f"register_memory answers {code}")
        self._registered = address

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
            except BaseException as error:  # handed to the caller's thread
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
        """Leave the engine behind, after a read that failed: closing it could wait for the peer."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._engine))

    def close(self) -> None:
        """Withdraw the registration and stop. No read may be under way."""
        if self._registered is not None:
            self._engine.unregister_memory(self._registered)
            self._registered = None
        # Its destructor waits up to a second for a thread that polls: nobody has to wait with it.
        engines, self._engine = [self._engine], None
        threading.Thread(target=engines.clear, name="mooncake-close", daemon=True).start()


def choose_protocol() -> str:
    """MOONCAKE_PROTOCOL, or rdma where there is a device for it, else tcp."""
    chosen = envs.MOONCAKE_PROTOCOL.get()
    if chosen:
        return chosen
    return "rdma" if os.path.isdir(RDMA_DEVICES) and os.listdir(RDMA_DEVICES) else "tcp"
