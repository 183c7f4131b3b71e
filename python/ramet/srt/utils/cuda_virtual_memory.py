"""Owns a GPU's memory whose addresses stay while what is behind them comes and goes, here and in other processes.

The driver's API for it: cuda.h; CUDA Driver API reference, "Virtual Memory Management". A CUDA context of the GPU must
be current in the calling thread.
"""

import contextlib
import ctypes
import weakref
from collections.abc import Iterator

from ramet.srt.utils.cuda_driver import call_driver, primary_context

# Values of cuda.h.
_ALLOCATION_PINNED = 1
_HANDLE_FILE_DESCRIPTOR = 1
_LOCATION_DEVICE = 1
_ACCESS_READ_WRITE = 3
_GRANULARITY_RECOMMENDED = 1
_HAS_VIRTUAL_MEMORY, _HAS_FILE_DESCRIPTORS, _HAS_RDMA = 102, 103, 110  # attributes of a device


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = [("kind", ctypes.c_int), ("id", ctypes.c_int)]


class _AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp, and the allocFlags in it."""

    _fields_ = [
        ("kind", ctypes.c_int),
        ("handle_kind", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _AccessDescription(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class VirtualMemory:
    """Addresses that stay this object's, and memory at them, which can be given back and taken again.

    torch makes a tensor of it by `__cuda_array_interface__`, which keeps the object.
    """

    def __init__(self, nbytes: int, gpu_id: int) -> None:
        """
        Args:
            nbytes: rounded up to what the driver gives at once.
            gpu_id: among those that this process sees.

        Raises:
            MemoryError: if the GPU has not so much.
            OSError: if the driver has no virtual memory for this GPU, or refuses it.
        """
        self._gpu_id = gpu_id
        for attribute in (_HAS_VIRTUAL_MEMORY, _HAS_FILE_DESCRIPTORS):
            if not _attribute(gpu_id, attribute):
                raise OSError(f"GPU {gpu_id} has no virtual memory that can be shared (device attribute {attribute})")
        self._properties = _properties(gpu_id)
        self.nbytes = _round_up(nbytes, self._properties)
        self._place = _Place(_reserve(self.nbytes), self.nbytes)
        self.address = self._place.address
        weakref.finalize(self, self._place.free, gpu_id).atexit = False
        self.take()

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """All bytes. https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "strides": None, "version": 3}

    @property
    def is_there(self) -> bool:
        """Whether there is memory at the addresses."""
        return self._place.handle is not None

    def take(self) -> None:
        """Have memory at the addresses, of any content.

        Raises:
            MemoryError: if the GPU has not so much; nothing has changed then.
            OSError: if the driver refuses, in the same way.
        """
        if self.is_there:
            return
        handle = ctypes.c_uint64()
        call_driver("cuMemCreate", ctypes.byref(handle), self.nbytes, ctypes.byref(self._properties), 0)
        try:
            self._place.show(handle.value, self._gpu_id)
        except BaseException:
            call_driver("cuMemRelease", handle.value)
            raise

    def give_back(self) -> None:
        """Give the memory back when nothing on the GPU uses it any more. Whoever has imported it keeps it so long.

        Raises:
            OSError: if the driver refuses.
        """
        if self.is_there:
            call_driver("cuCtxSynchronize")
            call_driver("cuMemRelease", self._place.hide())

    def take_over(self, other: "VirtualMemory") -> None:
        """Show the memory that `other` has at these addresses, where there is none; `other` has none then.

        Raises:
            OSError: if the driver refuses.
        """
        assert not self.is_there and other.is_there and self.nbytes == other.nbytes
        call_driver("cuCtxSynchronize")
        handle = other._place.hide()
        try:
            self._place.show(handle, self._gpu_id)
        except BaseException:
            other._place.show(handle, self._gpu_id)
            raise

    def export(self) -> int:
        """A file descriptor by which another process imports the memory; the caller closes it.

        Raises:
            OSError: if the driver refuses.
        """
        fd = ctypes.c_int(-1)
        call_driver("cuMemExportToShareableHandle", ctypes.byref(fd), self._place.handle, _HANDLE_FILE_DESCRIPTOR, 0)
        return fd.value


class _Place:
    """A range of addresses, and the handle of the memory that is there now."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self._nbytes = nbytes
        self.handle: int | None = None

    def show(self, handle: int, gpu_id: int) -> None:
        """Raises OSError if the driver refuses; nothing is there then."""
        call_driver("cuMemMap", self.address, self._nbytes, 0, handle, 0)
        access = _AccessDescription(_Location(_LOCATION_DEVICE, gpu_id), _ACCESS_READ_WRITE)
        try:
            call_driver("cuMemSetAccess", self.address, self._nbytes, ctypes.byref(access), 1)
        except BaseException:
            call_driver("cuMemUnmap", self.address, self._nbytes)
            raise
        self.handle = handle

    def hide(self) -> int:
        """The handle of what is not at the addresses any more."""
        assert self.handle is not None
        call_driver("cuMemUnmap", self.address, self._nbytes)
        handle, self.handle = self.handle, None
        return handle

    def free(self, gpu_id: int) -> None:
        """Give addresses and memory back, in whatever thread. What the driver says to that changes nothing."""
        with contextlib.suppress(OSError), primary_context(gpu_id):
            if self.handle is not None:
                call_driver("cuCtxSynchronize")
                call_driver("cuMemRelease", self.hide())
            call_driver("cuMemAddressFree", self.address, self._nbytes)


@contextlib.contextmanager
def imported(fd: int, nbytes: int, gpu_id: int) -> Iterator[int]:
    """Another process's memory, and its address here; no copy out of it may be under way at the end.

    Args:
        fd: see `VirtualMemory.export`; stays the caller's.
        nbytes: of that memory.
        gpu_id: of the GPU that shall see it, which may be another one.

    Raises:
        OSError: if it may not see it, or the memory is gone.
    """
    with contextlib.ExitStack() as undo:
        yield _import_at(fd, nbytes, gpu_id, 0, undo)


def import_for_good(fd: int, nbytes: int, gpu_id: int, address: int = 0) -> int:
    """The same until the process ends; returns the address.

    Args:
        address: where the memory is wished to be; 0: anywhere.
    """
    with contextlib.ExitStack() as undo:
        found = _import_at(fd, nbytes, gpu_id, address, undo)
        undo.pop_all()
    return found


def _import_at(fd: int, nbytes: int, gpu_id: int, wish: int, undo: contextlib.ExitStack) -> int:
    handle = ctypes.c_uint64()
    # The pointer that the driver asks for is the descriptor itself.
    call_driver("cuMemImportFromShareableHandle", ctypes.byref(handle), fd, _HANDLE_FILE_DESCRIPTOR)
    undo.callback(call_driver, "cuMemRelease", handle.value)
    place = _Place(_reserve(nbytes, wish), nbytes)
    undo.callback(call_driver, "cuMemAddressFree", place.address, nbytes)
    place.show(handle.value, gpu_id)
    undo.callback(place.hide)
    return place.address


def _properties(gpu_id: int) -> _AllocationProperties:
    return _AllocationProperties(
        kind=_ALLOCATION_PINNED,
        handle_kind=_HANDLE_FILE_DESCRIPTOR,
        location=_Location(_LOCATION_DEVICE, gpu_id),
        rdma=int(bool(_attribute(gpu_id, _HAS_RDMA))),
    )


def _attribute(gpu_id: int, attribute: int) -> int:
    value, device = ctypes.c_int(), ctypes.c_int()
    call_driver("cuDeviceGet", ctypes.byref(device), gpu_id)
    call_driver("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
    return value.value


def _round_up(nbytes: int, properties: _AllocationProperties) -> int:
    granularity = ctypes.c_size_t()
    call_driver(
        "cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(properties), _GRANULARITY_RECOMMENDED
    )
    return max(1, -(-nbytes // granularity.value)) * granularity.value


def _reserve(nbytes: int, wish: int = 0) -> int:
    address = ctypes.c_uint64()
    call_driver("cuMemAddressReserve", ctypes.byref(address), nbytes, 0, wish, 0)
    return address.value
