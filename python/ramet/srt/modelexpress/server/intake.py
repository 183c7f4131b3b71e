"""Owns the arrival of calls' messages: how long one may take, how many arrive at a time, how many bytes all may hold.

grpc waits for a unary call's message for ever, and reads as many as there are calls. So here every call is served as
one whose client streams, which is the same on the wire, and its one message is read for as long as it may take.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message

READ_S = 30.0  # for a message to be there
CROWD = 64  # messages on their way; where there are more,
PATIENCE_S = 0.5  # those give way that have taken longer than this
LARGE_BYTES = 1 << 20  # what is made of a longer message takes several times its bytes: one at a time
MAX_HELD_BYTES = 256 << 20  # of messages that are there and not answered

Parse = Callable[[bytes], Any]


class Intake:
    """All messages of one server that have come, or are coming."""

    def __init__(self) -> None:
        self._arriving: dict[asyncio.Timeout, float] = {}  # since when, the oldest first
        self._num_held_bytes = 0
        self._large = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def receive(self, parse: Parse, context: Any) -> AsyncIterator[Any]:
        """The call's message, held until it is answered. The call ends with an error if there is none."""
        data = await self._read(context)
        num_bytes = len(data)
        if self._num_held_bytes + num_bytes > MAX_HELD_BYTES:
            del data  # what an aborted call's frames have is kept until it is collected as garbage
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the messages of other calls take all memory now")
        self._num_held_bytes += num_bytes
        is_large = num_bytes > LARGE_BYTES
        try:
            async with self._large if is_large else contextlib.nullcontext():
                message = await asyncio.to_thread(_parsed, parse, data) if is_large else _parsed(parse, data)
                del data
                if message is None:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call's message can't be read")
                yield message
        finally:
            self._num_held_bytes -= num_bytes

    async def _read(self, context: Any) -> bytes:
        self._make_room()
        arrival = asyncio.timeout(READ_S)
        try:
            async with arrival:
                self._arriving[arrival] = time.monotonic()
                data = await context.read()  # an iterator would keep the message until it is collected as garbage
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's message has not come in time")
        finally:
            self._arriving.pop(arrival, None)
        if data is grpc.aio.EOF:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
        return bytes(data)

    def _make_room(self) -> None:
        """Where many are on their way, end the waiting for those that have had time to come."""
        now = time.monotonic()
        num_too_many = len(self._arriving) + 1 - CROWD
        for arrival, since in list(self._arriving.items())[: max(0, num_too_many)]:
            if now - since < PATIENCE_S:
                return
            arrival.reschedule(asyncio.get_running_loop().time())
            del self._arriving[arrival]


def _parsed(parse: Parse, data: bytes) -> Any:
    """None if it can't be parsed: an error would hold the data."""
    try:
        return parse(data)
    except DecodeError:
        return None


def server_handler(service: ServiceDescriptor, servicer: object, intake: Intake) -> grpc.GenericRpcHandler:
    """A handler that gives each method of `service` to the method of `servicer` with the same name.

    That answers a message, or one that it has serialized already.
    """
    handlers = {}
    for method in service.methods:
        answer = getattr(servicer, method.name)
        if method.server_streaming:
            serve, make = _serve_stream, grpc.stream_stream_rpc_method_handler
        else:
            serve, make = _serve, grpc.stream_unary_rpc_method_handler
        handlers[method.name] = make(serve(answer, method, intake), response_serializer=_serialize)
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def json_handler(
    service: str, methods: Mapping[str, tuple[Parse, Callable[[Any], bytes]]], intake: Intake
) -> grpc.GenericRpcHandler:
    """A handler of calls whose messages are JSON.

    Args:
        methods: by name, what reads a message, and what answers it; both may raise ValueError, which is told.
    """
    handlers = {
        name: grpc.stream_unary_rpc_method_handler(_serve_json(parse, answer, intake))
        for name, (parse, answer) in methods.items()
    }
    return grpc.method_handlers_generic_handler(service, handlers)


def _serve_json(parse: Parse, answer: Callable[[Any], bytes], intake: Intake) -> Callable[..., Any]:
    async def serve(_messages: Any, context: Any) -> Any:
        async with intake.receive(bytes, context) as data:
            try:
                return answer(parse(data))
            except ValueError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error)[:1000])

    return serve


def _serve(answer: Callable[..., Any], method: MethodDescriptor, intake: Intake) -> Callable[..., Any]:
    parse = message_factory.GetMessageClass(method.input_type).FromString

    async def serve(_messages: Any, context: Any) -> Any:
        async with intake.receive(parse, context) as request:
            return await answer(request, context)

    return serve


def _serve_stream(answer: Callable[..., Any], method: MethodDescriptor, intake: Intake) -> Callable[..., Any]:
    parse = message_factory.GetMessageClass(method.input_type).FromString

    async def serve(_messages: Any, context: Any) -> AsyncIterator[Any]:
        async with intake.receive(parse, context) as request:
            pass  # what is watched for is not long, and no message is held for the time of it
        async for one in answer(request, context):
            yield one

    return serve


def _serialize(answer: Message | bytes) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()
