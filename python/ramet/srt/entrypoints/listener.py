"""Owns the taking of the HTTP port, before anything else is done and without heavy imports."""

import socket

BACKLOG = 2048
ACCEPTS_PER_TURN = 16


def bind(host: str, port: int) -> socket.socket:
    """A listening socket: connections wait in it until somebody serves it.

    Raises:
        ValueError: if the address can't be had; the message names it and the flags.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"--host {host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ValueError(f"can't listen on {host}, port {port} (--host, --port): {error.strerror or error}") from None
    return listener


def shares(listener: socket.socket) -> list[socket.socket]:
    """The listener several times over, for a server on uvloop.

    In each turn of its event loop uvloop takes one connection from a socket. A turn takes tens of milliseconds where
    there is much to do, and the last of hundreds of new connections would wait for seconds.
    """
    return [listener, *(listener.dup() for _ in range(ACCEPTS_PER_TURN - 1))]
