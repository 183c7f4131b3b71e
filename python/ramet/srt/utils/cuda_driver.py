"""Owns the calls into the CUDA driver: how they are made, lending a GPU's memory by handle, and queueing copies.

The driver's API is used directly (cuda.h; CUDA Driver API reference, "Memory Management"), because with it a handle is
opened and closed exactly when we say. A CUDA context must be current in the calling thread.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_LAZY_ENABLE_PEER_ACCESS = 1
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


class Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [
        (f"{side}_{name}", kind)
        for side in ("source", "target")
        for name, kind in (
            ("x", ctypes.c_size_t),
            ("y", ctypes.c_size_t),
            ("memory_type", ctypes.c_uint),
            ("host", ctypes.c_void_p),
            ("device", ctypes.c_uint64),
            ("array", ctypes.c_void_p),
            ("pitch", ctypes.c_size_t),
        )
    ] + [("width", ctypes.c_size_t), ("height", ctypes.c_size_t)]


@functools.cache
def _driver() -> ctypes.CDLL:
    return _declare(ctypes.CDLL("libcuda.so.1"))


@functools.cache
def _driver_with_lock() -> ctypes.CDLL:
    """The same; a call keeps Python's lock, which is cheaper for one that only takes microseconds."""
    return _declare(ctypes.PyDLL("libcuda.so.1"))


def _declare(driver: ctypes.CDLL) -> ctypes.CDLL:
    address, size, stream = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
    handle, flags = ctypes.c_uint64, ctypes.c_ulonglong  # of virtual memory
    signatures = {
        "cuInit": [ctypes.c_uint],
        "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
        "cuDevicePrimaryCtxRetain": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int],
        "cuCtxSetCurrent": [ctypes.c_void_p],
        "cuCtxPushCurrent_v2": [ctypes.c_void_p],
        "cuCtxPopCurrent_v2": [ctypes.POINTER(ctypes.c_void_p)],
        "cuEventRecord": [ctypes.c_void_p, stream],
        "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
        "cuMemGetAddressRange_v2": [ctypes.POINTER(address), ctypes.POINTER(size), address],
        "cuIpcGetMemHandle": [ctypes.POINTER(_IpcHandle), address],
        "cuIpcOpenMemHandle_v2": [ctypes.POINTER(address), _IpcHandle, ctypes.c_uint],
        "cuIpcCloseMemHandle": [address],
        "cuMemHostRegister_v2": [ctypes.c_void_p, size, ctypes.c_uint],
        "cuMemHostUnregister": [ctypes.c_void_p],
        "cuMemcpyDtoDAsync_v2": [address, address, size, stream],
        "cuMemcpyHtoDAsync_v2": [address, ctypes.c_void_p, size, stream],
        "cuMemcpy2DAsync_v2": [ctypes.POINTER(Copy2D), stream],
        "cuCtxSynchronize": [],
        "cuDeviceGetAttribute": [ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int],
        "cuMemGetAllocationGranularity": [ctypes.POINTER(size), ctypes.c_void_p, ctypes.c_int],
        "cuMemAddressReserve": [ctypes.POINTER(address), size, size, address, flags],
        "cuMemAddressFree": [address, size],
        "cuMemCreate": [ctypes.POINTER(handle), size, ctypes.c_void_p, flags],
        "cuMemRelease": [handle],
        "cuMemMap": [address, size, size, handle, flags],
        "cuMemUnmap": [address, size],
        "cuMemSetAccess": [address, size, ctypes.c_void_p, size],
        "cuMemExportToShareableHandle": [ctypes.c_void_p, handle, ctypes.c_int, flags],
        "cuMemImportFromShareableHandle": [ctypes.POINTER(handle), ctypes.c_void_p, ctypes.c_int],
    }
    for name, argtypes in signatures.items():
        getattr(driver, name).argtypes = argtypes
    return driver


class DeviceMemoryError(OSError, MemoryError):
    """The GPU has no more memory."""


def call_driver(name: str, *arguments: object) -> None:
    """Call a function of the driver by its C name.

    Raises:
        OSError: with the driver's own words, if it fails; DeviceMemoryError for want of memory.
    """
    _check(name, getattr(_driver(), name)(*arguments))


def _check(name: str, code: int) -> None:
    if code != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        kind = DeviceMemoryError if code == _OUT_OF_MEMORY else OSError
        raise kind(f"{name}: {(text.value or b'unknown error').decode()} (CUDA error {code})")


def is_installed() -> bool:
    try:
        _driver()
    except OSError:
        return False
    return True


def retain_primary_context(gpu_id: int) -> None:
    """Make the context of a GPU that this process's libraries share, unless there is one. It stays.

    Raises:
        OSError: if there is no driver, or it refuses.
    """
    _retain_primary_context(gpu_id)


def use_primary_context(gpu_id: int) -> None:
    """The same, and make it the calling thread's. Raises OSError as that does."""
    call_driver("cuCtxSetCurrent", _retain_primary_context(gpu_id))


@contextlib.contextmanager
def primary_context(gpu_id: int) -> Iterator[None]:
    """The same for a while; the thread has the context afterwards that it had before. Raises OSError as that does."""
    call_driver("cuCtxPushCurrent_v2", _retain_primary_context(gpu_id))
    try:
        yield
    finally:
        call_driver("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


def _retain_primary_context(gpu_id: int) -> ctypes.c_void_p:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call_driver("cuInit", 0)
    call_driver("cuDeviceGet", ctypes.byref(device), gpu_id)
    call_driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


def export_memory(address: int) -> tuple[bytes, int]:
    """A handle by which other processes open the allocation around `address`, and where in it `address` is.

    Raises:
        OSError: if the memory can't be lent.
    """
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _IpcHandle()
    call_driver("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
    call_driver("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return bytes(handle), address - base.value


def open_memory(handle: bytes) -> int:
    """The address at which this process sees another one's allocation.

    Raises:
        OSError: if it may not, or the memory is gone; the message has the driver's reason.
    """
    if len(handle) != HANDLE_BYTES:
        raise OSError(f"a CUDA IPC handle has {HANDLE_BYTES} bytes, not {len(handle)}")
    address = ctypes.c_uint64()
    call_driver(
        "cuIpcOpenMemHandle_v2", ctypes.byref(address), _IpcHandle.from_buffer_copy(handle), _LAZY_ENABLE_PEER_ACCESS
    )
    return address.value


def reach_of(address: int, *, is_in_pieces: bool = False) -> int | None:
    """Bytes from an address to the end of the memory there, whoever has made it; None where the driver can't tell.

    Args:
        is_in_pieces: whether what was opened may be several allocations, one behind the other.
    """
    stop = _stop_of(address)
    if stop is None:
        return None
    while is_in_pieces and (further := _stop_of(stop)) is not None:
        stop = further
    return stop - address


def _stop_of(address: int) -> int | None:
    """Where the allocation around an address ends."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    try:
        call_driver("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
    except OSError:
        return None
    return base.value + size.value


def close_memory(address: int) -> None:
    """Give back what `open_memory` gave; no copy out of it may be under way."""
    call_driver("cuIpcCloseMemHandle", address)


def queue_upload(source: int, target: int, nbytes: int, stream: int) -> None:
    """Queue a copy from pinned host memory on a stream, without giving Python's lock away.

    Raises:
        OSError: if the driver refuses it.
    """
    _check("cuMemcpyHtoDAsync_v2", _driver_with_lock().cuMemcpyHtoDAsync_v2(target, source, nbytes, stream))


def record_event(event: int, stream: int) -> None:
    """Mark a place in a stream with a CUDA event, without giving Python's lock away.

    Raises:
        OSError: if the driver refuses it.
    """
    _check("cuEventRecord", _driver_with_lock().cuEventRecord(event, stream))
