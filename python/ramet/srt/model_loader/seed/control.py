"""Owns how an instance's main process asks one of its ranks something about its weights, on this node or another.

Each rank that offers its weights listens on a socket of its own; where, its registration tells the bootstrap server,
which tells nobody else. Each connection is one request. Serving goes on meanwhile: the answers come from threads.
"""

import asyncio
import collections
import hmac
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable

import msgspec

from ramet.srt.errors import ServiceError, one_line
from ramet.srt.utils.local_socket import ConnectionThreads, listen_on_abstract_name, peer_uid
from ramet.srt.utils.net import address_family
from ramet.srt.weights.control_messages import (
    InitSendGroupReq,
    SendWeightsReq,
    WeightControlError,
    WeightReply,
    WeightRequest,
)
from ramet.srt.weights.registration import ControlAddress

logger = logging.getLogger(__name__)

READ_TIMEOUT_S = 10.0  # for a request to come in whole
MAX_MESSAGE_BYTES = 64 << 20
MAX_LONG_REQUESTS = 64
CONNECT_PERIOD_S = 0.02
_LENGTH = struct.Struct("!Q")


_request_decoder = msgspec.msgpack.Decoder(WeightRequest)
_reply_decoder = msgspec.msgpack.Decoder(WeightReply)


class WeightControlServer:
    """A rank's side: a thread that accepts, and one for each request."""

    def __init__(self, handle: Callable[[WeightRequest], WeightReply], host: str | None) -> None:
        """
        Args:
            handle: answers a request; a ValueError or RuntimeError becomes a WeightControlError.
            host: address of this node if other nodes must reach it; None: only this host must.

        Raises:
            OSError: if there is no such address.
        """
        self._handle = handle
        token = secrets.token_hex(16)
        if host is None:
            listener, name = listen_on_abstract_name("ramet-control", socket.SOCK_STREAM)
            self.address = ControlAddress(token=token, name=name)
        else:
            listener = socket.create_server((host, 0), family=address_family(host))
            self.address = ControlAddress(token=token, host=host, port=listener.getsockname()[1])
        self._connections = ConnectionThreads(listener, self._answer, "weight-control")

    def close(self) -> None:
        """Take no more requests."""
        self._connections.close()

    def _answer(self, connection: socket.socket) -> None:
        try:
            if connection.family == socket.AF_UNIX and peer_uid(connection) != os.geteuid():
                return
            deadline = time.monotonic() + READ_TIMEOUT_S
            expected = self.address.token.encode()
            if not hmac.compare_digest(_receive(connection, len(expected), deadline), expected):
                return  # before anything else is read: whoever reaches a port can send
            (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size, deadline))
            if length > MAX_MESSAGE_BYTES:
                return
            reply = self._reply_to(_request_decoder.decode(_receive(connection, length, deadline)))
            data = msgspec.msgpack.encode(reply)
            connection.settimeout(READ_TIMEOUT_S)
            connection.sendall(_LENGTH.pack(len(data)) + data)
        except (OSError, ValueError) as error:
            logger.debug("a control request broke off: %s", error)

    def _reply_to(self, request: WeightRequest) -> WeightReply:
        try:
            return self._handle(request)
        except ServiceError as error:
            return WeightControlError(message=str(error), is_busy=True)
        except (ValueError, RuntimeError) as error:  # the latter from a GPU that has no room left, for example
            return WeightControlError(message=one_line(error))


def _receive(connection: socket.socket, length: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < length:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        chunk = connection.recv(min(1 << 20, length - len(data)))
        if not chunk:
            raise ConnectionError(f"it ended after {len(data)} of {length} bytes")
        data += chunk
    return bytes(data)


_num_long: collections.Counter[ControlAddress] = collections.Counter()  # requests under way that may take minutes


async def ask_rank(address: ControlAddress, request: WeightRequest, timeout_s: float) -> WeightReply:
    """The main process's side: a rank's reply to a request. Of those that may take long, only so many are passed on.

    Raises:
        OverflowError: if the request has a number beyond 64 bits.
        TimeoutError: if there is none within `timeout_s`.
        OSError: if the rank can't be reached, or has gone.
    """
    if not isinstance(request, InitSendGroupReq | SendWeightsReq):
        return await _ask_rank(address, request, timeout_s)
    if _num_long[address] >= MAX_LONG_REQUESTS:
        message = f"{MAX_LONG_REQUESTS} requests for weights of this rank are under way: try again in a moment"
        return WeightControlError(message=message, is_busy=True)
    _num_long[address] += 1
    try:
        return await _ask_rank(address, request, timeout_s)
    finally:
        _num_long[address] -= 1


async def _ask_rank(address: ControlAddress, request: WeightRequest, timeout_s: float) -> WeightReply:
    data = msgspec.msgpack.encode(request)
    async with asyncio.timeout(timeout_s):
        if address.name:
            reader, writer = await asyncio.open_unix_connection(sock=await _connect(address.name))
        else:
            reader, writer = await asyncio.open_connection(address.host, address.port)
        try:
            writer.write(address.token.encode() + _LENGTH.pack(len(data)) + data)
            await writer.drain()
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            return _reply_decoder.decode(await reader.readexactly(length))
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("the rank has broken the connection off") from error
        finally:
            writer.close()


async def _connect(name: str) -> socket.socket:
    """A connection to a name in the abstract namespace, which not every event loop can make by itself.

    Where as many wait to be accepted as may, this one waits for its turn: a socket in this family says so at once, and
    does not become writable later (connect(2), EAGAIN).
    """
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect("\0" + name)
            return connection
        except BlockingIOError:
            connection.close()
        except BaseException:
            connection.close()
            raise
        await asyncio.sleep(CONNECT_PERIOD_S)
