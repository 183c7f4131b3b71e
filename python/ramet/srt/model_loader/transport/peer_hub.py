"""Owns the talk between instances that take the same weights at the same time: who is there, and who has what.

No weights go this way. What a rank says here is heard at once, and so is its silence: whoever waits for it goes to
another one. The other side of each connection is a PeerHub too.
"""

import asyncio
import contextlib
import hmac
import secrets
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from ramet.srt.utils.net import address_family
from ramet.srt.weights.peer_messages import (
    Beat,
    Done,
    FromGiver,
    FromTaker,
    Hello,
    Holds,
    Offer,
    Others,
    PeerLink,
    PeerOffer,
    Refused,
    Took,
)

BEAT_S = 0.1
SILENCE_S = 0.35  # of one that gives: then it is left alone until it is heard again
GONE_S = 10.0  # of silence
HELLO_TIMEOUT_S = 5.0
NEWS_S = 0.02  # what happens within so short a time is told at once
MAX_CONNECTIONS = 256
MAX_OTHERS = 6  # that are told of to one that takes
MAX_MESSAGE_BYTES = 1 << 20

M = TypeVar("M")
_from_taker = msgspec.msgpack.Decoder(FromTaker)
_from_giver = msgspec.msgpack.Decoder(FromGiver)


class Listener:
    """What one that takes wants to hear of one that gives. Called in the hub's thread."""

    is_done = False  # nothing is heard any more, and nothing is missing

    def on_holds(self, holds: Holds) -> None: ...

    def on_others(self, others: Others) -> None: ...

    def on_silence(self, is_silent: bool) -> None: ...

    def on_end(self, reason: str) -> None:
        """Nothing follows."""


@dataclass(eq=False)
class _Taker:
    """A connection of one that takes."""

    writer: asyncio.StreamWriter
    news: asyncio.Event = field(default_factory=asyncio.Event)
    offer: PeerOffer | None = None
    is_done: bool = False


class PeerHub:
    """One rank's side of all these connections: a thread with an event loop."""

    def __init__(self, host: str, content: str) -> None:
        """
        Args:
            host: address of this host at which others reach it.
            content: what is given; see content_name.

        Raises:
            OSError: if there is no such address.
        """
        self._host = host
        self._content = content
        self._token = secrets.token_hex(16)
        self._holds = Holds()
        self._own_offer: PeerOffer | None = None  # None: nothing is given here so far
        self._takers: list[_Taker] = []
        self._num_given_bytes = 0
        self._to_givers: dict[Listener, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, host, 0, family=address_family(host))
        )
        port = self._server.sockets[0].getsockname()[1]
        self.link = PeerLink(host=host, port=port, token=self._token)
        self._thread = threading.Thread(target=self._loop.run_forever, name="peer-hub", daemon=True)
        self._thread.start()

    @property
    def num_given_bytes(self) -> int:
        """That others say they have taken from here."""
        return self._num_given_bytes

    @property
    def num_takers(self) -> int:
        return len(self._takers)

    def tell(self, holds: Holds) -> None:
        """Let others know what there is here now."""
        self._call(self._tell, holds)

    def follow(self, link: PeerLink, listener: Listener) -> None:
        """Connect to one that gives, and have its news told to the listener until it ends."""
        self._call(self._start, link, listener)

    def offer(self, offer: PeerOffer) -> None:
        """Say to all that are followed that from now on something is given here, too."""
        self._call(self._offer_to_all, offer)

    def say_taken(self, listener: Listener, nbytes: int) -> None:
        """Say to one that is followed how much has come from it."""
        self._call(self._send_to, listener, Took(nbytes))

    def finish(self, listener: Listener) -> None:
        """Say to one that is followed that nothing more is taken. The connection stays: so it tells others of this."""
        self._call(self._finish, listener)

    def leave(self, listener: Listener) -> None:
        """End a connection to one that is followed."""
        self._call(self._leave, listener)

    def close(self) -> None:
        """End all connections. May be called twice."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # In the loop

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _start(self, link: PeerLink, listener: Listener) -> None:
        task = self._loop.create_task(self._follow(link, listener))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _offer_to_all(self, offer: PeerOffer) -> None:
        self._own_offer = offer
        for listener in self._to_givers:
            self._send_to(listener, Offer(offer))

    async def _end(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _tell(self, holds: Holds) -> None:
        self._holds = holds
        self._wake()

    def _wake(self) -> None:
        for taker in self._takers:
            taker.news.set()

    def _send_to(self, listener: Listener, message: FromTaker) -> None:
        writer = self._to_givers.get(listener)
        if writer is not None and not writer.is_closing():
            _send(writer, message)

    def _finish(self, listener: Listener) -> None:
        listener.is_done = True
        self._send_to(listener, Done())

    def _leave(self, listener: Listener) -> None:
        writer = self._to_givers.get(listener)
        if writer is not None:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taker = _Taker(writer)
        with contextlib.closing(writer), contextlib.suppress(OSError, ValueError, EOFError, TimeoutError):
            hello = await asyncio.wait_for(_receive(reader, _from_taker), HELLO_TIMEOUT_S)
            if not isinstance(hello, Hello) or not hmac.compare_digest(hello.token.encode(), self._token.encode()):
                return
            refusal = self._refusal(hello)
            if refusal:
                _send(writer, Refused(refusal))
                await writer.drain()
                return
            taker.offer = hello.offer
            self._takers.append(taker)
            self._wake()
            telling = self._loop.create_task(self._tell_news(taker, writer))
            try:
                while True:
                    message = await _receive(reader, _from_taker)
                    if isinstance(message, Took):
                        self._num_given_bytes += message.nbytes
                    elif isinstance(message, Offer):
                        taker.offer = message.offer
                        self._wake()
                    elif isinstance(message, Done):
                        taker.is_done = True
                        telling.cancel()
                        self._wake()
            finally:
                telling.cancel()
                self._takers.remove(taker)
                self._wake()

    def _refusal(self, hello: Hello) -> str:
        if hello.content != self._content:
            return "other weights are here"
        if len(self._takers) < MAX_CONNECTIONS:
            return ""
        done = next((one for one in self._takers if one.is_done), None)
        if done is None:
            return "too many take from here"
        done.writer.close()
        return ""

    async def _tell_news(self, taker: _Taker, writer: asyncio.StreamWriter) -> None:
        """Tell what has changed, soon; and that there is somebody, where nothing has."""
        told: list[FromGiver] = []
        with contextlib.suppress(OSError):
            while True:
                taker.news.clear()
                news: list[FromGiver] = [self._holds, self._others_of(taker)]
                for message in news:
                    if message not in told:
                        _send(writer, message)
                if news == told:
                    _send(writer, Beat())
                told = news
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(taker.news.wait(), BEAT_S)
                    await asyncio.sleep(NEWS_S)

    def _others_of(self, taker: _Taker) -> Others:
        """Those who give, too: the ones of the same host first, and else other ones for each."""
        giving = [one for one in self._takers if one.offer is not None and not one.is_done]
        index, count = (giving.index(taker), len(giving)) if taker in giving else (0, 1)
        offers = [one.offer for one in self._takers if one is not taker and one.offer is not None]
        own_id, own_host = (taker.offer.peer_id, taker.offer.host_identity) if taker.offer is not None else ("", "")

        def distance(offer: PeerOffer) -> tuple[bool, int]:
            return offer.host_identity != own_host, zlib.crc32(f"{own_id} {offer.peer_id}".encode())

        return Others(sorted(offers, key=distance)[:MAX_OTHERS], index, count)

    async def _follow(self, link: PeerLink, listener: Listener) -> None:
        reason = "the connection was ended here"
        try:
            connecting = asyncio.open_connection(link.host, link.port)
            reader, writer = await asyncio.wait_for(connecting, HELLO_TIMEOUT_S)
            with contextlib.closing(writer):
                _send(writer, Hello(link.token, self._content, self._own_offer))
                self._to_givers[listener] = writer
                await self._listen(reader, listener)
        except EOFError:
            reason = "it has ended the connection"
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            reason = str(error) or "it can't be reached in time"
        finally:
            self._to_givers.pop(listener, None)
            listener.on_end(reason)

    async def _listen(self, reader: asyncio.StreamReader, listener: Listener) -> None:
        receiving = asyncio.ensure_future(_receive(reader, _from_giver))
        heard_at = time.monotonic()
        is_silent = False
        try:
            while listener.is_done or time.monotonic() - heard_at < GONE_S:
                done, _ = await asyncio.wait([receiving], timeout=None if listener.is_done else SILENCE_S)
                if not done:
                    # This thread may have been late itself: what has come meanwhile is looked at first.
                    done, _ = await asyncio.wait([receiving], timeout=0.01)
                if is_silent != (not done):
                    is_silent = not done
                    listener.on_silence(is_silent)
                if not done:
                    continue
                message = receiving.result()
                heard_at = time.monotonic()
                if isinstance(message, Refused):
                    raise ValueError(message.reason)
                if isinstance(message, Holds):
                    listener.on_holds(message)
                elif isinstance(message, Others):
                    listener.on_others(message)
                receiving = asyncio.ensure_future(_receive(reader, _from_giver))
            raise TimeoutError(f"nothing was heard of it for {GONE_S:g} s")
        finally:
            receiving.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError, ValueError, EOFError):
                await receiving


def _send(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    writer.write(len(data).to_bytes(4, "big") + data)


async def _receive(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[M]) -> M:
    """Raises ValueError for what is none of these messages; EOFError at the end."""
    length = int.from_bytes(await reader.readexactly(4), "big")
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes")
    return decoder.decode(await reader.readexactly(length))
