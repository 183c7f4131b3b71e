"""Owns addresses: how they are written, taken apart and found out."""

import os
import socket

import psutil


def format_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this host reaches `host`, as far as its name tells."""
    return host.startswith("127.") or host in ("localhost", "::1")


def split_address(address: str, flag: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[ipv6]:port".

    Raises:
        ValueError: if it is neither; the message names the flag.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ValueError(f"{flag} must be host:port; got {address!r}")
    return host.strip("[]"), int(port)


def local_address(peer: str | None) -> str:
    """This node's address as seen from `peer`, "host:port"; loopback without a peer."""
    if peer is None:
        return "127.0.0.1"
    host, port = split_address(peer, "--dist-init-addr")
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing: it only makes the kernel choose the interface
        return probe.getsockname()[0]


def choose_interface(address: str) -> None:
    """Have gloo and NCCL use the interface that holds `address`, unless the user has chosen one."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, name)
            return


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_identity() -> str:
    """Equal for two processes exactly if they run under one kernel and in one network namespace."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    return f"{boot_id}:{os.stat('/proc/self/ns/net').st_ino}"


def reachable_host(host: str) -> str:
    """The address by which other hosts reach a server that is bound to `host`."""
    if host not in ("0.0.0.0", "::", ""):
        return host
    family = socket.AF_INET6 if host == "::" else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: it only makes the kernel choose the interface that leads outside.
            probe.connect(("2001:db8::1", 9) if family == socket.AF_INET6 else ("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return "::1" if family == socket.AF_INET6 else "127.0.0.1"


def join_address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
