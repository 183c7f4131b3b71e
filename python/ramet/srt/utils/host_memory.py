"""Owns the calls into the kernel for memory: mapping, populating, sealing, and how much is left. Knows no weights."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
from collections.abc import Sequence

PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 2 << 20
# Addresses of 48 bits that are neither a program's nor its heap's (from 0x55 << 40 on), nor near those that the kernel
# chooses (below 0x80 << 40): the same ones are free in the next process, too.
_FAR_BEGIN, _FAR_END = 0x10 << 40, 0x50 << 40
PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

# Not all of these are in Python 3.11's mmap module.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FIXED_NOREPLACE = 0x100000
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_FALLOC_FL_KEEP_SIZE = 0x1
_FALLOC_FL_PUNCH_HOLE = 0x2
_F_SEAL_FUTURE_WRITE = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_MAP_FAILED = ctypes.c_void_p(-1).value


def reserve_addresses(nbytes: int) -> int:
    """Take a range of addresses, aligned to a huge page, that no memory backs yet; returns where it starts."""
    span = nbytes + HUGE_PAGE_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    start = _mmap(None, span, 0, flags, -1)
    aligned = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    if aligned > start:
        unmap(start, aligned - start)
    if start + span > aligned + nbytes:
        unmap(aligned + nbytes, start + span - aligned - nbytes)
    return aligned


def map_file_at(address: int, nbytes: int, fd: int, *, private: bool) -> None:
    """Put a file's first bytes at a range of addresses in place of what is there, in one step.

    Args:
        private: writes stay in this process (copy-on-write) instead of reaching the file.
    """
    _mmap(address, nbytes, PROT_READ_WRITE, _MAP_FIXED | (mmap.MAP_PRIVATE if private else mmap.MAP_SHARED), fd)
    # Only where the kernel has huge pages for shared memory; the mapping works as well without.
    _libc.madvise(address, nbytes, _MADV_HUGEPAGE)


def map_file_read_only(fd: int, nbytes: int, address: int = 0) -> int:
    """Show a file's first bytes where nobody, and no call into the kernel, can write to them; returns where.

    Args:
        address: where, if it must be there; 0: where nothing is likely to be in other processes.

    Raises:
        OSError: if it can't be mapped, or something else is there.
    """
    if address:
        return _map_exactly(fd, nbytes, address)
    for _ in range(8):
        start = random.randrange(_FAR_BEGIN, _FAR_END - nbytes, HUGE_PAGE_BYTES)
        try:
            return _map_exactly(fd, nbytes, start)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOMEM):  # ENOMEM: beyond the addresses of this kernel
                raise
    return _mmap(reserve_addresses(nbytes), nbytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, fd)


def _map_exactly(fd: int, nbytes: int, address: int) -> int:
    result = _mmap(address, nbytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED_NOREPLACE, fd)
    if result != address:  # kernels before 4.17 take it for a wish
        unmap(result, nbytes)
        raise OSError(errno.EEXIST, f"cannot map {nbytes} bytes: something else is at the address")
    return result


def map_files(fds: Sequence[int], nbytes: Sequence[int]) -> int:
    """Show the first bytes of several files one behind the other, writable; returns where they begin.

    Args:
        nbytes: of each, in whole pages.
    """
    start = address = reserve_addresses(sum(nbytes))
    for fd, length in zip(fds, nbytes, strict=True):
        map_file_at(address, length, fd, private=False)
        address += length
    return start


def map_nothing_at(address: int, nbytes: int) -> None:
    """Put throw-away memory at a range of addresses, in one step: whoever still writes there harms nobody."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
    _mmap(address, nbytes, PROT_READ_WRITE, flags, -1)


def map_no_access_at(address: int, nbytes: int) -> None:
    """Keep a range of addresses without any memory, in one step: whoever reads or writes there ends the process."""
    _mmap(address, nbytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED, -1)


def unmap(address: int, nbytes: int) -> None:
    if _libc.munmap(address, nbytes):
        raise _os_error(f"cannot unmap {nbytes} bytes")


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    result = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    if result == _MAP_FAILED:
        raise _os_error(f"cannot map {nbytes} bytes")
    return result


def _os_error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")


def populate(address: int, nbytes: int) -> bool:
    """Give a range of a mapping its memory now. False where the kernel (before 5.14) can't.

    Raises:
        MemoryError: if there isn't enough.
    """
    while _libc.madvise(address, nbytes, _MADV_POPULATE_WRITE):
        code = ctypes.get_errno()
        if code == errno.EINVAL:
            return False
        if code not in (errno.EAGAIN, errno.EINTR):
            raise MemoryError(f"cannot get {nbytes} bytes of memory: {os.strerror(code)}")
    return True


def create_memfd(name: str, nbytes: int) -> int:
    """A shared-memory file without a path that takes no memory until it is written; returns its descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def drop_file_memory(fd: int, nbytes: int, start: int = 0) -> None:
    """Give a memfd's memory back, from a byte on; it reads as zeros afterwards."""
    if _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, start, nbytes):
        raise _os_error("cannot give back the memory of a shared-memory file")


def resident_file_nbytes(fd: int) -> int:
    """Bytes of memory that a memfd holds."""
    return os.fstat(fd).st_blocks * 512


def seal_for_sharing(fd: int) -> None:
    """Make a memfd safe to hand out: its size is fixed, and nobody can write it but through mappings made before."""
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except PermissionError:  # sealed before, against further seals too
        if not is_sealed_for_sharing(fd):
            raise


def is_sealed_for_sharing(fd: int) -> bool:
    """Whether the file can neither shrink under a mapping nor be written by whoever receives it."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # not a memfd
        return False
    return bool(seals & fcntl.F_SEAL_SHRINK and seals & (fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE))


def view_memory(address: int, nbytes: int) -> ctypes.Array:
    """The bytes at an address as a buffer object. It does not keep the mapping alive."""
    return (ctypes.c_char * nbytes).from_address(address)


def available_memory_nbytes() -> int:
    """Bytes that can still be taken: the machine's, or what the tightest control group leaves, if that is less."""
    available = _machine_available_nbytes()
    for limit in (*_cgroup2_free_nbytes(), *_cgroup1_free_nbytes()):
        available = min(available, limit)
    return max(0, available)


def _machine_available_nbytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cgroup2_free_nbytes() -> list[int]:
    return _cgroup_free_nbytes("", "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def _cgroup1_free_nbytes() -> list[int]:
    root = "/sys/fs/cgroup/memory"
    return _cgroup_free_nbytes("memory", root, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _cgroup_free_nbytes(controller: str, root: str, limit: str, usage: str, reclaimable: str) -> list[int]:
    """What each control group above this process leaves. In a container the path may only exist at the root."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            paths = [path for _, names, path in (line.rstrip("\n").split(":", 2) for line in file)
                     if controller in names.split(",")]  # fmt: skip
    except OSError:
        return []
    free = []
    for path in paths:
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            folder = os.path.join(root, *parts[:depth])
            with contextlib.suppress(OSError, ValueError):  # absent here, or "max"
                free.append(_read_int(folder, limit) - _read_int(folder, usage) + _read_stat(folder, reclaimable))
    return free


def _read_int(folder: str, name: str) -> int:
    with open(os.path.join(folder, name), encoding="ascii") as file:
        return int(file.read())


def _read_stat(folder: str, key: str) -> int:
    with open(os.path.join(folder, "memory.stat"), encoding="ascii") as file:
        return next((int(value) for name, value in (line.split() for line in file) if name == key), 0)
