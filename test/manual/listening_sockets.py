"""Owns what is known of the sockets on which an instance listens: which they are, who may talk there, what it takes.

Read from /proc, without packages. A socket of no known kind is an error: whoever adds one says here what it takes.
"""

import contextlib
import os
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

TCP_LISTEN = "0A"
UNIX_ACCEPTS = 0x10000  # __SO_ACCEPTCON of unix(7)'s flags


@dataclass(frozen=True)
class Listener:
    """A listening socket of a process."""

    pid: int
    kind: str  # tcp, or unix
    address: str  # host:port, a path, or a name with @ before it


@dataclass(frozen=True)
class Kind:
    """Sockets that are alike. `process` and `address` are regular expressions for the whole text."""

    name: str
    process: str
    address: str
    who: str
    takes: str


def known_kinds(ports: dict[str, int]) -> list[Kind]:
    """What an instance listens on; the first that fits is taken.

    Args:
        ports: by the words "http", "bootstrap" and "store", as far as they are known.
    """

    def port(word: str) -> str:
        return rf".*:{ports[word]}" if word in ports else "(?!)"

    folder = r".*/ramet\.[a-z0-9_]{8}"
    return [
        Kind("HTTP", "main", port("http"), "clients", "the routes of docs/http.md; with --api-key only with a key"),
        Kind("engine-info bootstrap", "main", port("bootstrap"), "ranks, and instances that clone",
             "registrations of ranks, and questions about them (docs/wire.md)"),
        Kind("metadata server", "main|modelexpress_server", r"\[::ffff:.*\]:\d+", "instances of the fleet",
             "ModelExpress gRPC; with --auth-token-file only with a token (docs/modelexpress.md)"),
        Kind("metadata server's metrics", "main|modelexpress_server", r"127\..*|\[::1\]:\d+", "Prometheus, browsers",
             "GET of /metrics and of the fleet page"),
        Kind("ranks' store", r"scheduler \d+", port("store"), "ranks of all nodes",
             "torch's TCPStore, without a key"),
        Kind("tokenizer manager", "main", rf"{folder}/tokenizer", "this user's processes",
             "texts and replies, MessagePack"),
        Kind("detokenizer", "detokenizer", rf"{folder}/detok", "this user's processes", "tokens, MessagePack"),
        Kind("requests of a replica", r"scheduler \d+", rf"{folder}/scheduler-\d+", "this user's processes",
             "tokenised requests, MessagePack"),
        Kind("plans and results", r"scheduler \d+", rf"{folder}/(plans|results)-\d+", "this user's processes",
             "batch plans, and results of passes, MessagePack"),
        Kind("weight control", r"scheduler \d+", r"@.*ramet-control.*", "the main process of the same user (checked)",
             "questions about a rank's weights, with its token"),
        Kind("local weights", r"scheduler \d+", r"@.*ramet-weights.*", "processes of the same user (checked)",
             "hands out the arena's memory, read-only"),
        Kind("between ranks", r"scheduler \d+", r"(127\.|\[::1\]|10\.|192\.168\.).*:\d+", "ranks of the instance",
             "gloo's pairs, ZeroMQ between nodes, weight control between nodes (with a token)"),
        Kind("Mooncake", r"engine( \d+)?", r"(127\.|\[::1\]|\[::ffff:127\.).*:\d+", "whoever reaches the port",
             "Mooncake's handshake and data, without a key: see docs/transports.md"),
    ]  # fmt: skip


def classify(listener: Listener, process: str, kinds: list[Kind]) -> Kind:
    """Which kind a socket of the process with that name is.

    Raises:
        ValueError: if none is known.
    """
    for kind in kinds:
        if re.fullmatch(kind.process, process) and re.fullmatch(kind.address, listener.address):
            return kind
    raise ValueError(f"{process} listens on {listener.kind} {listener.address}, which nobody has described")


def listeners_of(pids: list[int]) -> list[Listener]:
    """The listening sockets that processes hold; one that several share is listed for the first of them."""
    found: list[Listener] = []
    seen: set[int] = set()
    for pid in pids:
        inodes = _socket_inodes(pid) - seen
        sockets = _listening(pid)
        found += [Listener(pid, *sockets[inode]) for inode in sorted(inodes & sockets.keys())]
        seen |= inodes & sockets.keys()
    return found


def _socket_inodes(pid: int) -> set[int]:
    inodes = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link)):
                    inodes.add(int(match[1]))
    return inodes


def _listening(pid: int) -> dict[int, tuple[str, str]]:
    """Inode -> kind and address of all that listen in the process's network namespace."""
    sockets: dict[int, tuple[str, str]] = {}
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == TCP_LISTEN:
                    sockets[int(fields[9])] = "tcp", _tcp_address(fields[1], family)
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
            fields = line.split(maxsplit=7)
            if int(fields[3], 16) & UNIX_ACCEPTS:
                sockets[int(fields[6])] = "unix", fields[7] if len(fields) > 7 else "?"
    return sockets


def _tcp_address(text: str, family: socket.AddressFamily) -> str:
    host, _, port = text.partition(":")
    words = [int(host[start : start + 8], 16) for start in range(0, len(host), 8)]
    name = socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
    return f"{f'[{name}]' if family == socket.AF_INET6 else name}:{int(port, 16)}"
