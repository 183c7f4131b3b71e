"""Owns where a native library listens: its calls of bind are led to one address, and what listens elsewhere is found.

Mooncake binds its sockets to every interface and has no option for another address (Mooncake 0.3.13). Its libraries
call bind through their tables of imported functions (System V ABI, "Dynamic Linking"; the relocation types are those of
the x86-64 and AArch64 supplements). Here the entries of that name get a function of ours. No other library is touched.
"""

import ctypes
import errno
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

PT_DYNAMIC = 2
DT_PLTRELSZ, DT_STRTAB, DT_SYMTAB, DT_RELA, DT_RELASZ, DT_JMPREL = 2, 5, 6, 7, 8, 23
IMPORTED_FUNCTION = {6, 7, 1025, 1026}  # R_X86_64_GLOB_DAT and _JUMP_SLOT, R_AARCH64_GLOB_DAT and _JUMP_SLOT
RELA_BYTES, SYMBOL_BYTES = 24, 24
LIBRARY_NAMES = (b"mooncake", b"transfer_engine")  # in the path of each library that is led
_SOCKADDR = struct.Struct("=HHI")  # family, port (big-endian), IPv4 address or IPv6 flow
LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp


class _ProgramHeader(ctypes.Structure):
    """Elf64_Phdr."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("kind", "flags")] + [
        (name, ctypes.c_uint64) for name in ("offset", "address", "physical", "file_size", "memory_size", "alignment")
    ]


class _Library(ctypes.Structure):
    """The beginning of struct dl_phdr_info: dl_iterate_phdr(3)."""

    _fields_ = [
        ("base", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("headers", ctypes.POINTER(_ProgramHeader)),
        ("num_headers", ctypes.c_uint16),
    ]


_Visitor = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Library), ctypes.c_size_t, ctypes.c_void_p)
_Bind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, use_errno=True)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.bind.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]
_kept: list[object] = []  # what native code has the address of


def lead_bind(address: str, port: int = 0) -> int:
    """Have Mooncake's libraries bind their TCP sockets to one address. They must be loaded.

    Args:
        address: an IPv4 or IPv6 address of this host.
        port: the first one that may be had, of the engine that is replaced by this one; 0: any.

    Returns:
        How many places were changed; 0 where the libraries don't call bind as is known here.
    """
    function = _Bind(_make_bind(address, port))
    _kept.append(function)
    target = ctypes.cast(function, ctypes.c_void_p).value
    assert target is not None
    places = list(_places_of(b"bind"))
    for place in places:
        _write_pointer(place, target)
    return len(places)


def _make_bind(address: str, port: int) -> Callable[[int, int, int], int]:
    """A bind(2) that puts `address` in the place of the one that is asked for."""
    is_v6 = ":" in address
    packed = socket.inet_pton(socket.AF_INET6 if is_v6 else socket.AF_INET, address)
    mapped = packed if is_v6 else bytes(10) + b"\xff\xff" + packed  # as a socket of both families names it
    is_taken = port == 0  # whether the port that must be had has been

    def bind(fd: int, wanted: int, nbytes: int) -> int:
        data = ctypes.string_at(wanted, nbytes)
        nonlocal is_taken
        family = struct.unpack_from("=H", data)[0]
        if family not in (socket.AF_INET, socket.AF_INET6):
            return _call_bind(fd, data)
        asked_port = socket.ntohs(_SOCKADDR.unpack_from(data)[1])
        if family == socket.AF_INET and is_v6:
            return _fail(errno.EADDRNOTAVAIL)
        if not is_taken and asked_port != port:
            return _fail(errno.EADDRINUSE)
        if port:
            _reuse_address(fd)  # connections of the engine before may not be forgotten yet
        data = data[:4] + packed + data[8:] if family == socket.AF_INET else data[:8] + mapped + data[24:]
        result = _call_bind(fd, data)
        if result == 0:
            is_taken = True
            _reuse_address(fd)  # not before: engines that start at once must not get one port
        return result

    return bind


def _call_bind(fd: int, data: bytes) -> int:
    result = _libc.bind(fd, data, len(data))
    ctypes.set_errno(ctypes.get_errno() if result else 0)
    return result


def _fail(code: int) -> int:
    ctypes.set_errno(code)
    return -1


def _reuse_address(fd: int) -> None:
    with socket.socket(fileno=os.dup(fd)) as copy:
        copy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def _places_of(symbol: bytes) -> Iterator[int]:
    """Where Mooncake's loaded libraries keep the address of an imported function."""
    places: list[int] = []

    def visit(library: "ctypes._Pointer[_Library]", _size: int, _data: int | None) -> int:
        if any(name in (library.contents.name or b"") for name in LIBRARY_NAMES):
            places.extend(_places_in(library.contents, symbol))
        return 0

    _libc.dl_iterate_phdr(_Visitor(visit), None)
    return iter(places)


def _places_in(library: _Library, symbol: bytes) -> Iterator[int]:
    """The same in one library."""
    for index in range(library.num_headers):
        header = library.headers[index]
        if header.kind != PT_DYNAMIC:
            continue
        table = dict(_dynamic_table(library.base + header.address))
        if DT_STRTAB not in table or DT_SYMTAB not in table:
            continue
        for begin, nbytes in ((DT_JMPREL, DT_PLTRELSZ), (DT_RELA, DT_RELASZ)):
            for relocation in range(table.get(begin, 0), table.get(begin, 0) + table.get(nbytes, 0), RELA_BYTES):
                info = _word(relocation + 8)
                if info & 0xFFFFFFFF in IMPORTED_FUNCTION and info >> 32:
                    name = ctypes.c_uint32.from_address(table[DT_SYMTAB] + SYMBOL_BYTES * (info >> 32)).value
                    if ctypes.string_at(table[DT_STRTAB] + name) == symbol:
                        yield library.base + _word(relocation)


def _dynamic_table(address: int) -> Iterator[tuple[int, int]]:
    """Tags and values; the C library has made addresses of the offsets among them when it loaded the library."""
    while tag := _word(address):
        yield tag, _word(address + 8)
        address += 16


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _write_pointer(place: int, value: int) -> None:
    """Raises OSError if the page can't be written."""
    page = place // mmap.PAGESIZE * mmap.PAGESIZE
    if _libc.mprotect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE):
        code = ctypes.get_errno()
        raise OSError(code, f"a library's table of functions can't be changed: {os.strerror(code)}")
    ctypes.c_uint64.from_address(place).value = value


class Listener(NamedTuple):
    """A TCP socket that takes connections."""

    address: str
    port: int


def listeners(pid: int | str = "self") -> set[Listener]:
    """Every TCP socket on which a process listens.

    Raises:
        OSError: if there is no such process, or it is another user's.
    """
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            inodes.add(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:  # closed meanwhile
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{pid}/net/{table}", encoding="ascii") as file:
                lines = file.read().splitlines()[1:]
        except FileNotFoundError:  # a kernel without IPv6
            continue
        for fields in map(str.split, lines):
            if fields[3] == LISTENING and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                found.add(Listener(_parse_address(address), int(port, 16)))
    return found


def _parse_address(text: str) -> str:
    """An address out of /proc/net/tcp: words of 32 bits in the host's order."""
    words = [int(text[index : index + 8], 16) for index in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    if len(packed) == 4:
        return socket.inet_ntop(socket.AF_INET, packed)
    if packed.startswith(bytes(10) + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)
