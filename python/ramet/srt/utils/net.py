"""Owns addresses: how they are written, taken apart and found out."""

import os
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple


def is_ipv6(host: str) -> bool:
    """Whether `host` is an IPv6 address, not an IPv4 address or a name."""
    return ":" in host


def address_family(host: str) -> socket.AddressFamily:
    """The family of a socket that is bound to the address `host`."""
    return socket.AF_INET6 if is_ipv6(host) else socket.AF_INET


def listen_on(host: str, port: int) -> socket.socket:
    """A TCP socket that listens on an address of this host, given in numbers or by a name, and nowhere else.

    Args:
        port: 0 takes a free one.

    Raises:
        OSError: if there is no such address here, or the port is in use.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def format_address(host: str, port: int | str) -> str:
    """host:port, with brackets around an IPv6 address. The port "*" is ZeroMQ's for a free one."""
    return f"[{host}]:{port}" if is_ipv6(host) else f"{host}:{port}"


def format_url(host: str, port: int, scheme: str = "http") -> str:
    return f"{scheme}://{format_address(host, port)}"


def split_address(address: str, flag: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[ipv6]:port".

    Raises:
        ValueError: if it is neither; the message names the flag.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ValueError(f"{flag} must be host:port; got {address!r}")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this host reaches `host`, as far as its name tells."""
    return host.startswith("127.") or host in ("localhost", "::1")


def is_own_address(host: str) -> bool:
    """Whether an address is one of this host's: nobody else can have it at the other end of a connection."""
    try:
        with socket.socket(address_family(host), socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def host_from_here(host: str) -> str:
    """The address by which this host reaches a server that is bound to `host`."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)


def reachable_host(host: str) -> str:
    """The address by which other hosts reach a server that is bound to `host`."""
    if host not in ("0.0.0.0", "::", ""):
        return host
    family = address_family(host)
    try:
        return _own_address(family, ("2001:db8::1", 9) if family == socket.AF_INET6 else ("192.0.2.1", 9))
    except OSError:  # there is no way outside
        return host_from_here(host)


def local_address(peer: str | None) -> str:
    """This node's address as seen from `peer`, "host:port"; loopback without a peer."""
    if peer is None:
        return "127.0.0.1"
    host, port = split_address(peer, "--dist-init-addr")
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    return _own_address(family, target)


def _own_address(family: socket.AddressFamily, target: Any) -> str:
    """The address of the interface that leads to `target`. Raises OSError if none does."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing: it only makes the kernel choose the interface
        return probe.getsockname()[0]


def choose_interface(host: str, backends: Sequence[str] = ("GLOO", "NCCL")) -> None:
    """Have gloo and NCCL use the interface that holds the address `host`, unless the user has chosen one."""
    import psutil  # only ranks that meet others need it

    addresses = {found[4][0] for found in socket.getaddrinfo(host, None)}
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address in addresses for entry in entries):
            for backend in backends:
                os.environ.setdefault(f"{backend}_SOCKET_IFNAME", name)
            return


def host_identity() -> str:
    """Equal for two processes exactly if they run under one kernel and in one network namespace."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    return f"{boot_id}:{os.stat('/proc/self/ns/net').st_ino}"


class SeedAddress(NamedTuple):
    """Where the HTTP server of an instance is that weights may come from."""

    host: str
    port: int
    scheme: str = "http"  # or "https"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{format_address(self.host, self.port)}"

    @property
    def name(self) -> str:
        """How logs, errors and reports call the instance."""
        return format_address(self.host, self.port) if self.scheme == "http" else self.url
