"""Owns answers over HTTP that take time: server-sent events, and giving up when the client has gone."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from ramet.srt.entrypoints.http.http_errors import body_of
from ramet.srt.errors import RequestError, ServiceError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
CLIENT_GONE_STATUS = 499  # never seen by anybody: the connection is closed

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has closed its connection before it had its answer."""


def json_response(content: Any) -> Response:
    """A success."""
    return Response(msgspec.json.encode(content), media_type="application/json")


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes away. The request's body must have been read.

    Raises:
        ClientGone: if it does.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def event_stream(request: Request, events: AsyncGenerator[Any, None]) -> Response:
    """Send `events` as JSON, then [DONE]. Returns when the first is there: an error before it is an ordinary answer.

    Raises:
        RequestError, ServiceError: what `events` raises before its first event.
        ClientGone: if the client goes away before that.
    """
    try:
        first = await until_disconnect(request, _first(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStreamResponse(_encoded(first, events), media_type="text/event-stream")


async def _first(events: AsyncGenerator[Any, None]) -> Any:
    return await anext(events)


async def _encoded(first: Any, events: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        yield encode_event(first)
        try:
            async for event in events:
                yield encode_event(event)
        except (RequestError, ServiceError) as error:
            yield encode_event(body_of(error))
        except Exception as error:
            logger.exception("a stream failed")
            yield encode_event(body_of(error))
        yield DONE


def encode_event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


class EventStreamResponse(StreamingResponse):
    """A StreamingResponse that closes its generator at once when the client goes away, not when it is collected."""

    body_iterator: AsyncGenerator[bytes, None]

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):
            await super().stream_response(send)
