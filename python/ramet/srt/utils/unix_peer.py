"""Owns the question of who is at the other end of a Unix socket."""

import socket
import struct

_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end of a connected Unix socket, as the kernel knows it."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return _UCRED.unpack(data)[1]
