"""Owns the receiver process: a member of a trainer's gloo group, apart from the rank that needs what is sent.

gloo ends the process that is sent more than it expects. Here that is one process less, and the rank learns of it.
"""

import contextlib
import mmap
import os
import socket
import sys
import time

import msgspec
import torch
import torch.distributed as dist

from ramet.srt.distributed.broadcast_group import BroadcastGroup, connect, torch_keys
from ramet.srt.distributed.receiver_messages import MESSAGE_BYTES, Place, ReceiverReply, ReceiverRequest
from ramet.srt.distributed.trainer_store import wait_for_listener
from ramet.srt.errors import one_line
from ramet.srt.utils.helper_process import begin_helper
from ramet.srt.utils.net import local_address


def main(fd: int) -> None:
    """Serve the socket until the other side closes it."""
    begin_helper(b"ramet-receiver")
    with contextlib.suppress(OSError):
        _serve(socket.socket(fileno=fd))
    os._exit(0)  # gloo's destructors wait for operations that are stuck


def _serve(connection: socket.socket) -> None:
    decoder = msgspec.msgpack.Decoder(ReceiverRequest)
    member: _Member | None = None
    connection.send(msgspec.msgpack.encode(ReceiverReply()))  # it has started
    while True:
        data, fds, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1)
        if not data:
            return
        request = decoder.decode(data)
        error = ""
        try:
            if isinstance(request, Place):
                member = _Member(request)
            else:
                assert member is not None, "the group is joined first"
                member.receive(fds[0], request.nbytes, request.timeout_s)
        except (OSError, RuntimeError, MemoryError) as failure:
            error = one_line(failure)
        connection.send(msgspec.msgpack.encode(ReceiverReply(error)))


class _Member:
    """One member of a group. Raises OSError where the others do not what they should."""

    def __init__(self, place: Place) -> None:
        deadline = time.monotonic() + place.timeout_s
        wait_for_listener(place, deadline)
        left_s = max(1.0, deadline - time.monotonic())
        store: dist.Store = connect(place.host, place.port, left_s, place.size)
        # vLLM's stateless groups put nothing but their address before the keys, and meet after every broadcast.
        self._meets = not place.name
        keys = torch_keys(store, place.name, "cpu") if place.name else dist.PrefixStore(f"tcp://{place.address}", store)
        own = local_address(place.address)
        self._group = BroadcastGroup(keys, place.rank, place.size, torch.device("cpu"), own, left_s)

    def receive(self, fd: int, nbytes: int, timeout_s: float) -> None:
        self._group.timeout_s = timeout_s
        with contextlib.closing(os.fdopen(fd, "r+b", buffering=0)) as file:
            memory = mmap.mmap(file.fileno(), nbytes)
        self._group.broadcast(torch.frombuffer(memory, dtype=torch.uint8))
        if self._meets:
            self._group.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]))
