"""Owns the tokenizer manager's sockets: requests and questions out, outputs and replies in."""

import asyncio
import os
from collections.abc import Callable

import zmq

from ramet.srt.managers.io_struct import Message, decode, encode
from ramet.srt.managers.port_args import PortArgs

MAX_MESSAGES_AT_ONCE = 16  # before others have the event loop


class TokenizerChannel:
    """PUSH to the detokenizer and to the schedulers, none of which is ever waited for; PULL from all of them.

    Raises:
        zmq.ZMQError: if there can be no such sockets.
    """

    def __init__(self, port_args: PortArgs):
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._reader = self._context.socket(zmq.PULL)
        self._reader.setsockopt(zmq.RCVHWM, 0)
        if port_args.tokenizer_fd is not None:
            self._reader.setsockopt(zmq.USE_FD, os.dup(port_args.tokenizer_fd))  # zmq closes what it gets
        self._reader.bind(port_args.tokenizer_ipc_name)
        self._writers: list[zmq.Socket[bytes]] = []

    def connect(self, address: str) -> Callable[[Message], None]:
        """What sends to who reads at an address. It never blocks: messages wait in memory until they are taken."""
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, 1)
        socket.connect(address)
        self._writers.append(socket)

        def send(message: Message) -> None:
            if not socket.closed:
                socket.send(encode(message), zmq.NOBLOCK)

        return send

    async def receive_forever(self, take_message: Callable[[Message], None]) -> None:
        """Hand over what comes. Runs until cancelled, or until `take_message` raises something.

        It is called back when there is something, and takes all of it at once: a task that waits for each message
        costs two turns of the event loop more.
        """
        loop = asyncio.get_running_loop()
        failure: asyncio.Future[None] = loop.create_future()

        def take() -> None:
            if failure.done():
                return
            try:
                is_empty = self._take_some(take_message)
            except Exception as error:  # noqa: BLE001 - who waits for this coroutine gets it
                failure.set_exception(error)
            else:
                if not is_empty:
                    loop.call_soon(take)  # the others first

        loop.add_reader(self._reader.fileno(), take)
        try:
            take()
            await failure
        finally:
            loop.remove_reader(self._reader.fileno())

    def _take_some(self, take_message: Callable[[Message], None]) -> bool:
        """Take what is there; False if that may not be all. The socket tells of more only when it was empty before."""
        for _ in range(MAX_MESSAGES_AT_ONCE):
            try:
                data = self._reader.recv(zmq.NOBLOCK)
            except zmq.Again:
                return True
            take_message(decode(data))
        return False

    def close(self) -> None:
        """Close the sockets; unsent messages are dropped."""
        for socket in (self._reader, *self._writers):
            socket.close(linger=0)
        self._context.term()
