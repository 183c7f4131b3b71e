"""Owns Mooncake's TransferEngine in this process: starting it, where it listens, registering memory, and reads."""

import contextlib
import ctypes
import glob
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ramet.srt.environ import envs
from ramet.srt.model_loader.transport.engine_messages import StartEngine
from ramet.srt.model_loader.transport.listening_address import lead_bind, listeners

RDMA_DEVICES = "/sys/class/infiniband"
HARMLESS_LOG = (b"Logging before InitGoogleLogging() is written", b"Local segment descriptor not found")
NUM_PORTS = 20  # that an engine may try which takes another one's place
HANDSHAKE = "P2PHANDSHAKE"  # the engines find each other by session id, without a metadata server


class EngineError(RuntimeError):
    """Mooncake can't do what it was asked for."""


class EngineMissingError(EngineError):
    """Mooncake is not installed, or lacks something."""


class MooncakeEngine:
    """One TransferEngine of this process.

    It is never destroyed: its destructor holds the GIL for a second, and waits for reads that are stuck.
    """

    def __init__(self, start: StartEngine) -> None:
        """
        Raises:
            EngineMissingError: if Mooncake is not installed.
            EngineError: if it does not start, or listens elsewhere than it may.
        """
        # Mooncake logs to stderr, past Python's logging; its warnings say nothing that a return code does not.
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        if ":" in start.address:
            os.environ["MC_USE_IPV6"] = "1"  # it is read when the libraries are loaded
        if start.port:
            _choose_port(start.port)
        engine_class = _import_engine()
        lead_bind(start.address, start.port)
        before = listeners()
        self._engine = engine_class()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._engine))
        with _without_harmless_log():
            code = self._engine.initialize(start.name, HANDSHAKE, start.protocol, start.devices)
        if code != 0:
            raise EngineError(f"Mooncake with the protocol {start.protocol} answers {code}")
        self.port: int = self._engine.get_rpc_port()
        elsewhere = sorted(one for one in listeners() - before if one.address != start.address)
        if elsewhere:
            raise EngineError(
                f"Mooncake listens on port {elsewhere[0].port} of {elsewhere[0].address}, and may on "
                f"{start.address} alone"
            )
        if start.port and self.port != start.port:
            raise EngineError(f"Mooncake listens on port {self.port}, not on {start.port}")

    def register(self, address: int, nbytes: int) -> None:
        """Make memory readable for others, and usable as the target of reads. Raises EngineError if refused."""
        code = self._engine.register_memory(address, nbytes)
        if code != 0:
            raise EngineError(f"register_memory answers {code}")

    def unregister(self, address: int) -> None:
        """Withdraw a registration. No read of this process into it may be under way."""
        self._engine.unregister_memory(address)

    def read(self, session_id: str, local: Sequence[int], remote: Sequence[int], nbytes: Sequence[int]) -> None:
        """Read ranges of a peer's registered memory in one batch; none may be empty. It may never return.

        Raises:
            EngineError: if Mooncake says that it failed.
        """
        result = self._engine.batch_transfer_sync_read(session_id, list(local), list(remote), list(nbytes))
        if result < 0:
            raise EngineError(f"Mooncake answers {result}")


def _import_engine() -> Any:
    """Mooncake's class. Raises EngineMissingError if it can't be imported."""
    try:
        return importlib.import_module("mooncake.engine").TransferEngine
    except ImportError as error:
        if error.name == "mooncake":
            reason = "it is not installed; ramet[cpu], ramet[cuda12] and ramet[cuda13] have it"
            raise EngineMissingError(f"Mooncake can't be used: {reason}") from error
        # Its builds for CUDA rely on libraries that torch loads, where torch is imported before.
        if not _load_cuda_runtime():
            raise EngineMissingError(f"Mooncake can't be used: {error}") from error
    try:
        return importlib.import_module("mooncake.engine").TransferEngine
    except ImportError as error:
        raise EngineMissingError(f"Mooncake can't be used: {error}") from error


def _load_cuda_runtime() -> bool:
    """Load the CUDA runtime out of the packages that torch has it from. False if there is none."""
    found = [path for folder in sys.path for path in glob.glob(f"{glob.escape(folder)}/nvidia/*/lib/libcudart.so.*")]
    for path in found:
        with contextlib.suppress(OSError):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return bool(found)


def _choose_port(port: int) -> None:
    """Let Mooncake, which tries ports at random, try few: our bind gives it `port` first, then others."""
    first, last = (_port_limit(end, default) for end, default in (("MIN", 15000), ("MAX", 17000)))  # Mooncake's own
    if last - port < NUM_PORTS:
        first, last = max(first, port - NUM_PORTS), max(last, port)
    else:
        first, last = port, port + NUM_PORTS
    os.environ["MC_MIN_RPC_PORT"], os.environ["MC_MAX_RPC_PORT"] = str(first), str(last)


def _port_limit(end: str, default: int) -> int:
    """What the user has set; the second spelling is Mooncake's older one."""
    text = os.environ.get(f"MC_{end}_RPC_PORT") or os.environ.get(f"MC_{end}_PRC_PORT") or ""
    return int(text) if text.isdigit() else default


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
