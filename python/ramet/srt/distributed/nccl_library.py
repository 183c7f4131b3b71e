"""Owns talking to NCCL itself, for groups that are not torch's. The prototypes are those of nccl.h, from 2.14 on.

Communicators are made without blocking, so that each call returns and every wait has a deadline.
"""

import ctypes
import threading
import time
from typing import Any

LIBRARY = "libnccl.so.2"  # the one that torch has loaded already
UNIQUE_ID_BYTES = 128
POLL_S = 0.0005
SUCCESS, IN_PROGRESS = 0, 7  # ncclResult_t
UINT8, FLOAT32 = 1, 7  # ncclDataType_t
SUM = 0  # ncclRedOp_t
CONFIG_MAGIC, CONFIG_VERSION = 0xCAFEBEEF, 21400  # what ncclConfig_t was then is a part of what it is now


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * UNIQUE_ID_BYTES),)


class _Config(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    )


_ARGUMENTS: dict[str, list[Any]] = {
    "ncclCommInitRankConfig": [ctypes.c_void_p, ctypes.c_int, _UniqueId, ctypes.c_int, ctypes.c_void_p],
    "ncclCommGetAsyncError": [ctypes.c_void_p, ctypes.c_void_p],
    "ncclCommAbort": [ctypes.c_void_p],
    "ncclAllReduce": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 2, *[ctypes.c_void_p] * 2],
    "ncclBroadcast": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 2, *[ctypes.c_void_p] * 2],
}


def load_library() -> Any:
    """NCCL. Raises OSError if there is none."""
    library = ctypes.CDLL(LIBRARY)
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    library.ncclGetErrorString.argtypes, library.ncclGetErrorString.restype = [ctypes.c_int], ctypes.c_char_p
    return library


class Communicator:
    """One member of a group, on the GPU that is current in the thread that makes it."""

    def __init__(self, library: Any, unique_id: bytes, rank: int, size: int, timeout_s: float) -> None:
        """Meet the others.

        Args:
            library: see `load_library`.
            unique_id: what ncclGetUniqueId has given rank 0.

        Raises:
            OSError: if they don't come in time, or NCCL finds something wrong with them.
        """
        if len(unique_id) != UNIQUE_ID_BYTES:
            raise OSError(f"a unique id of NCCL's has {UNIQUE_ID_BYTES} bytes, and this one {len(unique_id)}")
        self._library = library
        self._handle = ctypes.c_void_p()
        self._lock = threading.Lock()  # around each use of the handle: none begins or goes on once it is given back
        config = _Config(ctypes.sizeof(_Config), CONFIG_MAGIC, CONFIG_VERSION, 0)
        made = library.ncclCommInitRankConfig(
            ctypes.byref(self._handle), size, _UniqueId.from_buffer_copy(unique_id), rank, ctypes.byref(config)
        )
        try:
            self._settle(made, timeout_s)
        except OSError:
            self.abort()
            raise

    def all_reduce(self, address: int, count: int, stream: int, timeout_s: float) -> None:
        """Queue the sum of float32 values over all members, in place.

        Raises:
            OSError: if NCCL can't, or not in time.
        """
        with self._lock:
            begun = self._library.ncclAllReduce(address, address, count, FLOAT32, SUM, self._handle, stream)
        self._settle(begun, timeout_s)

    def broadcast(self, address: int, nbytes: int, root: int, stream: int, timeout_s: float) -> None:
        """Queue what `root` broadcasts next. Raises OSError as `all_reduce`."""
        with self._lock:
            begun = self._library.ncclBroadcast(address, address, nbytes, UINT8, root, self._handle, stream)
        self._settle(begun, timeout_s)

    def check(self) -> bool:
        """Whether nothing is being begun any more. Raises OSError if something has gone wrong by itself."""
        state = ctypes.c_int()
        with self._lock:
            result = self._library.ncclCommGetAsyncError(self._handle, ctypes.byref(state))
        self._expect(result)
        self._expect(state.value)
        return state.value != IN_PROGRESS

    def abort(self) -> None:
        """Break off what is under way, and leave. May be called from any thread."""
        with self._lock:
            handle, self._handle = self._handle, ctypes.c_void_p()
        if handle:
            self._library.ncclCommAbort(handle)

    def _settle(self, result: int, timeout_s: float) -> None:
        self._expect(result)
        deadline = time.monotonic() + timeout_s
        while not self.check():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no progress within {timeout_s:g} s")
            time.sleep(POLL_S)

    def _expect(self, result: int) -> None:
        if result not in (SUCCESS, IN_PROGRESS):
            raise OSError(f"NCCL: {self._library.ncclGetErrorString(result).decode()}")
