"""A parked model's port: who wakes it, what is answered without waking it, and when it is parked again."""

import asyncio
import contextlib
import socket

import pytest
from ramet.srt.entrypoints.standby.find_standby import Awake, NoStandbyError
from ramet.srt.entrypoints.standby.parked import MAX_HEAD_BYTES, ParkedModel

KEY = "secret"


class Upstream:
    """A server that answers each request with its own name, and says how many connections it has had."""

    def __init__(self, name):
        self.name, self.num_connections, self.num_heads = name, 0, 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exception):
        self.server.close()

    async def _serve(self, reader, writer):
        self.num_connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.num_heads += 1
                body = await reader.readexactly(5) if b"content-length: 5" in head.lower() else b""
                text = self.name.encode() + b" " + body
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
                await writer.drain()
        writer.close()


class Finder:
    """Wakes the upstreams in turn."""

    def __init__(self, *upstreams, failure=None):
        self.upstreams, self.failure = list(upstreams), failure
        self.wakes, self.put_downs, self.lost = 0, 0, set()

    def wake(self, body, timeout_s):
        if self.failure is not None:
            raise NoStandbyError(self.failure)
        upstream = self.upstreams[self.wakes % len(self.upstreams)]
        self.wakes += 1
        return Awake(upstream.url, str(body["model_path"]))

    def put_down(self, awake, timeout_s):
        self.put_downs += 1

    def serves(self, awake):
        return awake.url not in self.lost


@contextlib.asynccontextmanager
async def parked(finder, *keys, idle_timeout_s=0.0, wake_timeout_s=0.3):
    model = ParkedModel({"model_path": "m"}, finder, keys, idle_timeout_s=idle_timeout_s, wake_timeout_s=wake_timeout_s)
    listener = socket.create_server(("127.0.0.1", 0))
    end = asyncio.Event()
    serving = asyncio.create_task(model.serve(listener, end))
    try:
        yield model, listener.getsockname()[1]
    finally:
        end.set()
        await asyncio.wait_for(serving, 10)


async def ask(port, path="/v1/completions", key=None, body=b"hello"):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"POST {path} HTTP/1.1", "Host: h", "Content-Length: 5", "Connection: close"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    writer.write_eof()
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    head, _, text = answer.partition("\r\n\r\n")
    return int(head.split()[1]), text


@pytest.mark.asyncio
async def test_the_first_requests_wait_for_one_wake_and_are_answered():
    async with Upstream("one") as one:
        finder = Finder(one)
        async with parked(finder) as (_, port):
            assert await ask(port, "/health") == (200, '{"status": "parked"}') and finder.wakes == 0
            answers = await asyncio.gather(*(ask(port) for _ in range(5)))
            assert answers == [(200, "one hello")] * 5 and finder.wakes == 1
            assert (await ask(port, "/health"))[1] == "one hello"
        assert finder.put_downs == 1


@pytest.mark.asyncio
async def test_strangers_wake_nobody():
    async with Upstream("one") as one:
        finder = Finder(one)
        async with parked(finder, KEY) as (_, port):
            assert (await ask(port))[0] == 401 and (await ask(port, key="other"))[0] == 401
            assert finder.wakes == 0
            assert await ask(port, key=KEY) == (200, "one hello")


@pytest.mark.asyncio
async def test_where_no_standby_is_found_in_time_it_is_said():
    async with parked(Finder(failure="all are busy")) as (_, port):
        status, text = await ask(port)
        assert status == 503 and "all are busy" in text


@pytest.mark.asyncio
async def test_without_requests_it_is_parked_again_and_wakes_anew():
    async with Upstream("one") as one, Upstream("two") as two:
        finder = Finder(one, two)
        async with parked(finder, idle_timeout_s=0.2) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /x HTTP/1.1\r\n\r\n")
            assert b"one" in await reader.readuntil(b"one ")
            assert await asyncio.wait_for(reader.read(), 10) == b""  # closed when it was put down
            writer.close()
            assert finder.put_downs == 1
            assert await ask(port) == (200, "two hello") and finder.wakes == 2


@pytest.mark.asyncio
async def test_another_takes_the_place_of_one_that_has_gone():
    async with Upstream("one") as one, Upstream("two") as two:
        finder = Finder(one, two)
        async with parked(finder) as (_, port):
            assert await ask(port) == (200, "one hello")
            finder.lost.add(one.url)
            assert await ask(port) == (200, "two hello")
            finder.lost.add(two.url)
            status, text = await ask(port)
            assert status == 503 and "no more" in text
            assert (one.num_heads, two.num_heads) == (1, 1), "what serves another model was told something"


@pytest.mark.asyncio
async def test_a_head_without_an_end_is_refused():
    async with Upstream("one") as one, parked(Finder(one)) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /x HTTP/1.1\r\nA: " + b"a" * (MAX_HEAD_BYTES + 10))
        assert b" 400 " in await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert one.num_connections == 0
