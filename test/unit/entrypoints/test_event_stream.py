"""Answers that take time: their events, their errors, and clients that go away."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from ramet.srt.entrypoints.http.event_stream import ClientGone, event_stream, until_disconnect
from ramet.srt.errors import RequestError
from starlette.requests import Request

DONE = b"data: [DONE]\n\n"


class Connection:
    """A client that has sent its body, and is there until `leave`."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.request = Request({"type": "http", "headers": []}, self.receive)

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def stream(self, events: AsyncGenerator[Any, None]) -> bytes:
        """The body that the client gets."""
        response = await event_stream(self.request, events)
        await response(self.request.scope, self.receive, self.send)
        return b"".join(message.get("body", b"") for message in self.sent)


class Events:
    """Some events, then an error or a long wait."""

    def __init__(self, num: int, error: Exception | None = None, waits: bool = False) -> None:
        self.is_closed = False
        self._num, self._error, self._waits = num, error, waits

    async def make(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self._num):
                yield number
            if self._error is not None:
                raise self._error
            if self._waits:
                await asyncio.Event().wait()
        finally:
            self.is_closed = True


async def test_events_and_their_end() -> None:
    connection, events = Connection(), Events(3)
    assert await connection.stream(events.make()) == b"data: 0\n\ndata: 1\n\ndata: 2\n\n" + DONE
    start, *bodies = connection.sent
    assert (start["status"], start["headers"]) == (200, [(b"content-type", b"text/event-stream; charset=utf-8")])
    assert [message["more_body"] for message in bodies] == [True, True, True, False]
    assert events.is_closed


async def test_an_error_before_the_first_event_is_raised() -> None:
    events = Events(0, RequestError("it is bad"))
    with pytest.raises(RequestError, match="it is bad"):
        await Connection().stream(events.make())
    assert events.is_closed


@pytest.mark.parametrize(
    ("error", "text"), [(RequestError("it is bad"), b"it is bad"), (KeyError("secret"), b"internal error")]
)
async def test_an_error_later_is_the_last_event(error: Exception, text: bytes) -> None:
    body = await Connection().stream(Events(1, error).make())
    first, last, rest = body.removesuffix(DONE).split(b"\n\n")
    assert first == b"data: 0" and text in last and b"secret" not in last and rest == b"" and body.endswith(DONE)


@pytest.mark.parametrize("num_events", [0, 2])
async def test_a_client_that_goes_ends_the_events(num_events: int) -> None:
    connection, events = Connection(), Events(num_events, waits=True)
    streaming = asyncio.create_task(connection.stream(events.make()))
    await asyncio.sleep(0.01)
    assert not streaming.done() and not events.is_closed
    connection.left.set()
    if num_events:
        assert await asyncio.wait_for(streaming, 5) == b"data: 0\n\ndata: 1\n\n"
    else:
        with pytest.raises(ClientGone):
            await asyncio.wait_for(streaming, 5)
    assert events.is_closed


async def test_work_that_is_done_as_the_client_goes_is_not_cancelled_later() -> None:
    connection = Connection()

    async def work() -> str:
        connection.left.set()
        await asyncio.sleep(0)  # the listener ends in this turn of the event loop
        return "done"

    async def ask() -> str:
        answer = await until_disconnect(connection.request, work())
        for _ in range(5):
            await asyncio.sleep(0)
        return answer

    assert await asyncio.create_task(ask()) == "done"


async def test_a_cancelled_route_is_not_taken_for_a_client_that_has_gone() -> None:
    connection = Connection()
    asking = asyncio.create_task(until_disconnect(connection.request, asyncio.Event().wait()))
    await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
