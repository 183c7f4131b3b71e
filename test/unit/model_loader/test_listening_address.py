"""Where native code listens: its calls of bind as they are led, and what is found of a process's listening sockets."""

import ctypes
import errno
import socket
import struct

import pytest
from ramet.srt.model_loader.transport import listening_address
from ramet.srt.model_loader.transport.listening_address import Listener, listeners


def ask(led, sock: socket.socket, port: int, family: int | None = None) -> int:
    """What native code does: bind to every address. The errno, or 0."""
    family = family or sock.family
    head = struct.pack("=H", family) + struct.pack("!H", port)
    data = head + (bytes(12) if family == socket.AF_INET else bytes(24))
    buffer = ctypes.create_string_buffer(data, len(data))
    result = led(sock.fileno(), ctypes.addressof(buffer), len(data))
    return ctypes.get_errno() if result else 0


@pytest.mark.parametrize(
    ("family", "address", "bound"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "127.0.0.3", "127.0.0.3"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "127.0.0.1", "::ffff:127.0.0.1"),
    ],
)
def test_a_socket_for_every_address_gets_one(family, address, bound):
    led = listening_address._make_bind(address, 0)
    with socket.socket(family) as sock:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        assert ask(led, sock, 0) == 0
        sock.listen()
        assert sock.getsockname()[0] == bound
        port = sock.getsockname()[1]
        assert Listener(bound.removeprefix("::ffff:"), port) in listeners()
        with socket.socket(family) as second:  # what the kernel refuses, the caller is told
            assert ask(led, second, port) == errno.EADDRINUSE


def test_an_address_of_the_other_family_and_other_sockets():
    led = listening_address._make_bind("::1", 0)
    with socket.socket(socket.AF_INET) as sock:
        assert ask(led, sock, 0) == errno.EADDRNOTAVAIL
    with socket.socket(socket.AF_UNIX) as sock:
        name = struct.pack("=H", socket.AF_UNIX) + b"\0ramet-test-led-bind"
        buffer = ctypes.create_string_buffer(name, len(name))
        assert led(sock.fileno(), ctypes.addressof(buffer), len(name)) == 0
        assert sock.getsockname() == b"\0ramet-test-led-bind"


def test_a_successor_gets_the_port_first_and_others_after_it():
    with socket.create_server(("127.0.0.1", 0)) as before:
        port = before.getsockname()[1]
    led = listening_address._make_bind("127.0.0.1", port)
    with socket.socket() as one, socket.socket() as two:
        assert ask(led, one, 0) == errno.EADDRINUSE
        assert ask(led, one, port) == 0
        assert ask(led, two, 0) == 0 and two.getsockname()[1] != port


def test_only_mooncake_s_libraries_are_led(monkeypatch):
    """Others' sockets, which libraries of Python's make, go where they are told to."""
    led = set(listening_address._places_of(b"bind"))
    with monkeypatch.context() as patch:
        patch.setattr(listening_address, "LIBRARY_NAMES", (b"",))
        assert set(listening_address._places_of(b"bind")) > led
    with socket.create_server(("0.0.0.0", 0)) as sock:
        assert Listener("0.0.0.0", sock.getsockname()[1]) in listeners()
