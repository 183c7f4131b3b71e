"""New connections do not wait for seconds where the event loop has much to do."""

import asyncio
import contextlib
import socket
import time
from typing import Any

import pytest
import uvicorn
from ramet.srt.entrypoints import listener

NUM_CONNECTIONS = 64
TURN_S = 0.01

uvloop = pytest.importorskip("uvloop", reason="the package uvloop is not installed")


async def application(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


async def turns_until_all_are_answered(sockets: list[socket.socket], port: int) -> int:
    """Turns of the event loop, each of which takes a while, from many connections to their answers."""
    server = uvicorn.Server(uvicorn.Config(application, lifespan="off", log_config=None))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    serving = asyncio.create_task(server.serve(sockets))
    while not server.started:
        await asyncio.sleep(0.01)
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(NUM_CONNECTIONS)]
    for client in clients:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        client.setblocking(False)
    num_turns, waiting = 0, list(clients)
    while waiting:
        num_turns += 1
        time.sleep(TURN_S)  # as if other requests had work for it
        await asyncio.sleep(0)
        waiting = [client for client in waiting if not is_answered(client)]
        assert num_turns < 1000
    for client in clients:
        client.close()
    server.should_exit = True
    await serving
    return num_turns


def is_answered(client: socket.socket) -> bool:
    try:
        return bool(client.recv(4096))
    except BlockingIOError:
        return False


def test_many_connections_are_taken_in_a_turn() -> None:
    found = {}
    for kind in ("one", "shares"):
        bound = listener.bind("127.0.0.1", 0)
        port = bound.getsockname()[1]
        sockets = listener.shares(bound) if kind == "shares" else [bound]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found[kind] = runner.run(turns_until_all_are_answered(sockets, port))
        with pytest.raises(ConnectionRefusedError):  # all of them are closed
            socket.create_connection(("127.0.0.1", port), 1)
    assert found["shares"] < found["one"] / 4, found
