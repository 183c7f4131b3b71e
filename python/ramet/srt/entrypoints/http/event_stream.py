"""Owns answers over HTTP that take time: server-sent events, and giving up when the client has gone."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ramet.srt.entrypoints.http.http_errors import body_of, error_response
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.observability.request_record import current_request

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
EVENT_STREAM_HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"),)
CLIENT_GONE_STATUS = 499  # never seen by anybody: the connection is closed

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has closed its connection before it had its answer."""


def client_gone_response() -> Response:
    """For nobody."""
    return error_response(CLIENT_GONE_STATUS, "the client has gone")


def json_response(content: Any) -> Response:
    """A success."""
    return Response(msgspec.json.encode(content), media_type="application/json")


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes away. The request's body must have been read.

    Raises:
        ClientGone: if it does.
    """
    listener = _listen(request)
    try:
        async with _UntilGone(listener):
            return await work
    finally:
        listener.cancel()
        work.close()  # where it has not begun


class _UntilGone:
    """A with block that the task running it leaves with ClientGone when the listener is done.

    As asyncio.timeout does it: no task is made for the work, whose every step would cost a turn of the event loop.
    """

    def __init__(self, listener: "asyncio.Task[None]") -> None:
        self._listener = listener
        self._is_gone = self._is_over = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._num_cancels = task.cancelling()
        self._listener.add_done_callback(self._on_gone)

    def _on_gone(self, _listener: "asyncio.Task[None]") -> None:
        if not self._is_over:
            self._is_gone = True
            self._task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        self._is_over = True
        self._listener.remove_done_callback(self._on_gone)
        if self._is_gone and self._task.uncancel() <= self._num_cancels and kind is asyncio.CancelledError:
            raise ClientGone from error


def _listen(request: Request) -> "asyncio.Task[None]":
    """A task that ends when the client goes away."""
    return asyncio.create_task(_disconnected(request.receive))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def encode_event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def encode_named_event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event that is called by its type, as APIs with several kinds of events have it."""
    return b"event: " + content["type"].encode() + b"\n" + encode_event(content)


def _encode_error(error: Exception) -> bytes:
    return encode_event(body_of(error)) + DONE


async def event_stream(
    request: Request,
    events: AsyncGenerator[Any, None],
    *,
    encode: Callable[[Any], bytes] = encode_event,
    encode_error: Callable[[Exception], bytes] = _encode_error,
    last: bytes = DONE,
) -> Response:
    """Send `events`, then `last`. Returns when the first is there: an error before it is an ordinary answer.

    Args:
        encode: makes a server-sent event of what the generator yields.
        encode_error: makes the end of the stream of what it raises.

    Raises:
        RequestError, ServiceError: what `events` raises before its first event.
        ClientGone: if the client goes away before that.
    """
    listener = _listen(request)
    try:
        async with _UntilGone(listener):
            first = await anext(events)
    except BaseException:
        listener.cancel()
        await events.aclose()
        raise
    return EventStreamResponse(first, events, listener, encode, encode_error, last)


class EventStreamResponse(Response):
    """Sends `first` and then `events` as they come. Closes the generator at once when the client goes away."""

    def __init__(
        self,
        first: Any,
        events: AsyncGenerator[Any, None],
        listener: "asyncio.Task[None]",
        encode: Callable[[Any], bytes],
        encode_error: Callable[[Exception], bytes],
        last: bytes,
    ) -> None:
        self.status_code = 200
        self.raw_headers = list(EVENT_STREAM_HEADERS)
        self.background = None
        self._first = first
        self._events = events
        self._listener = listener
        self._encode = encode
        self._encode_error = encode_error
        self._last = last

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                with contextlib.suppress(ClientGone):
                    async with _UntilGone(self._listener):
                        await self._send_all(send)
        finally:
            self._listener.cancel()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._encode(self._first), "more_body": True})
        while (data := await self._next()) is not None:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": self._last, "more_body": False})

    async def _next(self) -> bytes | None:
        """The next event; None when `_last` is all that is left."""
        try:
            return self._encode(await anext(self._events))
        except StopAsyncIteration:
            pass
        except (RequestError, ServiceError) as error:
            self._note(str(error))
            self._last = self._encode_error(error)
        except Exception as error:
            logger.exception("a stream failed")
            self._note("internal error")
            self._last = self._encode_error(error)
        return None

    @staticmethod
    def _note(error: str) -> None:
        """For the log: the status has been sent, and says that all is well."""
        if (request := current_request()) is not None:
            request.error = error
