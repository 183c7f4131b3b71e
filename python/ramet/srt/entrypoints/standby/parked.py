"""Owns a parked model's port: the first request has a standby become the model, waits for that, and is answered.

Once it is awake, connections are handed on byte by byte: whatever clients and the instance say to each other is theirs.
After a time without a byte the instance is a standby again. Nothing reaches another model that it may have become
since: each connection is opened before it is asked what it serves, and a standby that changes closes those that are.
"""

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from ramet.srt.entrypoints.http.http_access import HEALTH_PATHS, NO_KEY, has_key
from ramet.srt.entrypoints.http.http_errors import error_body
from ramet.srt.entrypoints.standby.find_standby import Awake, NoStandbyError, StandbyFinder

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10
HEAD_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
RETRY_S = 0.5  # between two looks for a standby
NUM_TRIES = 3  # of instances that are not what they were
PIECE_BYTES = 256 << 10
TLS_HANDSHAKE = 0x16  # the first byte of a connection by TLS
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 503: "Service Unavailable"}


class ParkedModel:
    """One model that is awake while somebody uses it.

    Args:
        body: of /become.
        keys: one of which a request must have to wake it; none are needed where there are none.
        idle_timeout_s: without a byte, until it is put down; 0: never.
        wake_timeout_s: for a request to wait until it is awake.
    """

    def __init__(
        self,
        body: Mapping[str, Any],
        finder: StandbyFinder,
        keys: tuple[str, ...],
        *,
        idle_timeout_s: float,
        wake_timeout_s: float,
    ):
        self._body, self._finder, self._keys = body, finder, keys
        self._idle_timeout_s, self._wake_timeout_s = idle_timeout_s, wake_timeout_s
        self._awake: Awake | None = None
        self._used_at = time.monotonic()
        self._turn = asyncio.Lock()
        self._connections: set[asyncio.Task[None]] = set()

    async def wake_now(self) -> Awake:
        """Have a standby become the model before anybody asks, in one attempt. Raises NoStandbyError if none does."""
        async with self._turn:
            self._awake = await asyncio.to_thread(self._finder.wake, self._body, self._wake_timeout_s)
            return self._awake

    async def serve(self, listener: socket.socket, end: asyncio.Event) -> None:
        """Serve until `end`; what is awake then is put down."""
        server = await asyncio.start_server(self._connected, sock=listener, limit=MAX_HEAD_BYTES)
        idling = asyncio.create_task(self._watch_idleness())
        try:
            await end.wait()
        finally:
            server.close()
            idling.cancel()
            async with self._turn:
                await self._put_down()
            await server.wait_closed()

    # -- Awake and not

    async def _wake(self) -> Awake:
        """An instance that serves the model. Raises NoStandbyError if there is none in time."""
        async with self._turn:
            if self._awake is not None:
                return self._awake
            begun = time.monotonic()
            while True:
                left_s = self._wake_timeout_s - (time.monotonic() - begun)
                try:
                    self._awake = await asyncio.to_thread(self._finder.wake, self._body, max(left_s, 1.0))
                    break
                except NoStandbyError as error:
                    if left_s <= RETRY_S:
                        raise
                    logger.warning("no standby becomes %s yet: %s", self._body["model_path"], error)
                await asyncio.sleep(RETRY_S)
            self._used_at = time.monotonic()
            logger.info("%s is awake at %s after %.3f s", self._body["model_path"], self._awake.url,
                        self._used_at - begun)  # fmt: skip
            return self._awake

    async def _open(self) -> Connection:
        """A connection to an instance that serves the model. Raises NoStandbyError if there is none in time."""
        for _ in range(NUM_TRIES):
            awake = await self._wake()
            try:
                upstream = await self._connect(awake)
                if await asyncio.to_thread(self._finder.serves, awake):
                    return upstream
                upstream[1].close()
                failure = "it serves it no more"
            except (OSError, ValueError) as error:
                failure = str(error) or "it does not answer"
            logger.warning("%s was awake at %s: %s", self._body["model_path"], awake.url, failure)
            if self._awake is awake:
                self._awake = None
        raise NoStandbyError(failure)

    async def _connect(self, awake: Awake) -> Connection:
        parts = urlsplit(awake.url)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            return await asyncio.open_connection(parts.hostname, parts.port)

    async def _watch_idleness(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, max(self._idle_timeout_s / 4, 0.05)))
            if self._idle_timeout_s and time.monotonic() - self._used_at > self._idle_timeout_s:
                async with self._turn:
                    if time.monotonic() - self._used_at > self._idle_timeout_s:
                        await self._put_down()

    async def _put_down(self) -> None:
        """Requests that still run end first; then connections are closed."""
        awake, self._awake = self._awake, None
        if awake is None:
            return
        try:
            await asyncio.to_thread(self._finder.put_down, awake, self._wake_timeout_s)
            logger.info("%s is parked again", self._body["model_path"])
        except (OSError, ValueError) as error:
            logger.warning("%s can't be put down: %s", awake.url, error)
        for connection in self._connections:
            connection.cancel()

    # -- Connections

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve_one(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # it has gone, or is to go
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(HEAD_TIMEOUT_S):
            head = await reader.readexactly(1)
            if head[0] != TLS_HANDSHAKE:
                try:
                    head += await reader.readuntil(b"\r\n\r\n")
                except asyncio.LimitOverrunError:
                    await _answer(writer, 400, error_body(400, "the head of the request is too long"))
                    return
        if head[0] != TLS_HANDSHAKE and (answer := self._own_answer(head)) is not None:
            await _answer(writer, *answer)
            return
        try:
            upstream = await self._open()
        except NoStandbyError as error:
            message = f"{self._body['model_path']} is parked, and no standby can become it now: {error}"
            await _answer(writer, 503, error_body(503, message))
            return
        await self._exchange(head, (reader, writer), upstream)

    def _own_answer(self, head: bytes) -> tuple[int, Mapping[str, Any]] | None:
        """What is answered without the model; None for what needs it."""
        line, *lines = head.decode("latin-1").split("\r\n")
        path = urlsplit((line.split(" ") + [""])[1]).path.rstrip("/")
        if path in HEALTH_PATHS:
            return (200, {"status": "parked"}) if self._awake is None else None
        pairs = [one.partition(":") for one in lines if one]
        headers = Headers(raw=[(name.strip().lower().encode("latin-1"), value.strip().encode("latin-1"))
                               for name, _, value in pairs])  # fmt: skip
        if self._keys and not any(has_key(headers, key) for key in self._keys):
            return 401, error_body(401, NO_KEY, code="invalid_api_key")
        return None

    async def _exchange(
        self,
        head: bytes,
        client: Connection,
        upstream: Connection,
    ) -> None:
        """Hand bytes on both ways until one side has gone."""
        self._used_at = time.monotonic()
        upstream[1].write(head)
        asking = asyncio.create_task(self._pump(client[0], upstream[1]))
        answering = asyncio.create_task(self._pump(upstream[0], client[1]))
        try:
            await asyncio.wait((asking, answering), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():  # a client may have said all, and still listen
                await answering
        finally:
            for task in (asking, answering):
                task.cancel()
            upstream[1].close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                self._used_at = time.monotonic()
                writer.write(piece)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()


async def _answer(writer: asyncio.StreamWriter, status: int, body: Mapping[str, Any]) -> None:
    text = json.dumps(body).encode()
    more = "Retry-After: 1\r\n" if status == 503 else ""
    head = f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: application/json\r\n{more}"
    writer.write(f"{head}Content-Length: {len(text)}\r\nConnection: close\r\n\r\n".encode() + text)
    await writer.drain()
