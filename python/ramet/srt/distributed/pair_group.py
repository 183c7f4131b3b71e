"""Owns a group of two processes of different instances, one of which sends weights to the other. Not a default group.

The side that sends is rank 0 and holds the store at which both meet. Names are given, never made from a host's name.
"""

import datetime
import select
import socket

import torch
import torch.distributed as dist

from ramet.srt.distributed.broadcast_group import BroadcastGroup, connect, torch_keys
from ramet.srt.distributed.node_pulse import first_line
from ramet.srt.utils.net import listen_on

__all__ = ["RECEIVER", "SENDER", "PairGroup", "connect", "listen", "open_store", "wait_for_client"]

SENDER, RECEIVER = 0, 1


def listen(host: str, port: int) -> socket.socket:
    """A socket of this node at which the other side will find a group's store, at that address and nowhere else.

    Args:
        port: 0 takes a free one.

    Raises:
        OSError: if the port is in use, or there is no such address.
    """
    try:
        return listen_on(host, port)
    except OSError as error:
        raise OSError(f"port {port} of {host} can't be used: {error.strerror}") from None


def wait_for_client(listener: socket.socket, timeout_s: float) -> bool:
    """Whether somebody connects within `timeout_s`. The connection waits for the store."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


def open_store(listener: socket.socket, host: str, timeout_s: float) -> dist.TCPStore:
    """The store of a group, at a socket that is given back with the object.

    Args:
        host: the address of this node that the socket is bound to.

    Raises:
        OSError: if it doesn't start.
    """
    port = listener.getsockname()[1]
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
    except (dist.DistError, RuntimeError) as error:
        raise OSError(f"port {port} of {host} can't be used: {first_line(error)}") from None


class PairGroup(BroadcastGroup):
    """One of the two sides. Every operation ends within the time limit, well or with an OSError."""

    def __init__(
        self, store: dist.Store, name: str, rank: int, device: torch.device, address: str, timeout_s: float
    ) -> None:
        """Meet the other side.

        Args:
            name: the same on both sides. The keys in the store are those of torch's own groups of this name.
            device, address, timeout_s: see BroadcastGroup.

        Raises:
            OSError: if the other side does not come in time.
        """
        super().__init__(torch_keys(store, name, device.type), rank, 2, device, address, timeout_s)
