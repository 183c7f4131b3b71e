"""The guard of connections: a real server on a loop in a thread, with limits of tenths of seconds."""

import asyncio
import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import h11
import pytest
import uvicorn
from ramet.srt.utils import file_limit, http_guard
from ramet.srt.utils.http_guard import GuardedConnection, HttpLimits, guarded_protocol

LIMITS = HttpLimits(max_connections=4, header_s=0.15, body_s=0.15, write_s=0.15, linger_s=0.1)
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body; /hold is answered when the client has gone, /flood with more than anybody takes."""
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect":
            return
        if not message.get("more_body"):
            break
    if scope["path"] == "/hold":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(2000 if scope["path"] == "/flood" else 0):
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    await send({"type": "http.response.body", "body": f"got {size}".encode()})


@contextlib.contextmanager
def serving(limits: HttpLimits) -> Iterator[tuple[int, Any]]:
    protocol = guarded_protocol(limits, "/health".__eq__)
    config = uvicorn.Config(application, http=protocol, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield listener.getsockname()[1], protocol.guard
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def quick_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "SWEEP_PERIOD_S", 0.02)


def connect(port: int, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.sendall(data)
    return connection


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the end."""
    data = b""
    with connection, contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            data += part
    return data


def ask(port: int, data: bytes) -> bytes:
    return rest_of(connect(port, data))


def test_deadlines(quick_sweeps: None) -> None:
    with serving(LIMITS) as (port, guard):
        silent, slow_header = connect(port), connect(port, b"GET / HTTP/1.1\r\nHo")
        slow_body = connect(port, POST + b"Content-Length: 100\r\n\r\nabc")
        start = time.monotonic()
        while time.monotonic() - start < 0.1:  # a byte now and then wins no time
            slow_header.sendall(b"o")
            slow_body.sendall(b"o")
            time.sleep(0.03)
        answers = [rest_of(one) for one in (slow_header, slow_body)]
        assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers)
        assert b"headers" in answers[0] and b"body" in answers[1]
        assert rest_of(silent) == b""
        assert time.monotonic() - start < 2

        kept = connect(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")  # an idle one is uvicorn's, until its next byte
        time.sleep(0.2)
        kept.sendall(b"G")
        assert rest_of(kept).count(b"HTTP/1.1 ") == 2

        unread = connect(port, b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        deadline = time.monotonic() + 3
        while guard._connections and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not guard._connections
        unread.close()


ODD_REQUESTS = [
    (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 2000, 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
    (b"GET / HTTP/1.1\r\nHost: x\r\na: " + b"b" * 70000, 431),
    (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    (b"\x16\x03\x01" * 20, 400),
    (POST + b"Connection: close\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200000, 200),
    (
        POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + b"20\r\n" + b"x" * 32 + b"\r\n0\r\n\r\n",
        200,
    ),
]


def test_what_is_only_sent_to_cost_is_refused() -> None:
    with serving(LIMITS) as (port, _guard):
        for request, status in ODD_REQUESTS:
            assert ask(port, request).split(b" ")[1] == str(status).encode(), request[:100]


@pytest.mark.parametrize(
    ("request_bytes", "reason"),
    [
        (b'garb"age\r\n\r\n', "illegal request line: 'garb\"age'"),
        (b"GET / HTTP/1.1\r\nno header\r\n\r\n", "illegal header line: 'no header'"),
        (b"\x16\x03\x01" * 20, "it begins as TLS does; this server is reached by http://"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", "the URL has more than 8192 bytes"),
    ],
)
def test_why_a_request_is_none_stands_in_the_answer_and_in_one_line_of_the_log(
    request_bytes: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(LIMITS) as (port, _guard), caplog.at_level(logging.INFO):
        answer = ask(port, request_bytes)
    message = f"this is no valid HTTP request: {reason}"
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == message
    (line,) = [record for record in caplog.messages if "127.0.0.1" in record or "Invalid" in record]
    logged = re.sub("'.*'", "…", message)  # what has come may be anything, such as a header with a key
    assert line.startswith("refused: a request from 127.0.0.1: 4") and line.endswith(logged)


def test_long_bodies_share_a_rate_and_short_ones_do_not_wait(
    quick_sweeps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_guard, "BODY_BYTES_PER_S", 2 << 20)
    body = b"x" * (1 << 20)
    long = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    limits = HttpLimits(max_connections=4, body_s=0.15, body_bytes_per_s=1e9)  # our pauses are not the client's
    with serving(limits) as (port, _guard):
        start = time.monotonic()
        answers: list[bytes] = []
        senders = [threading.Thread(target=lambda: answers.append(ask(port, long))) for _ in range(2)]
        for sender in senders:
            sender.start()
        time.sleep(0.1)
        assert b"got 0" in ask(port, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert not answers
        for sender in senders:
            sender.join()
        assert [b"got %d" % len(body) in answer for answer in answers] == [True, True]
        assert time.monotonic() - start > 0.5


def test_connections_are_bounded_and_health_has_room(caplog: pytest.LogCaptureFixture) -> None:
    limits = HttpLimits(max_connections=4)
    with serving(limits) as (port, guard), caplog.at_level(logging.WARNING), contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connect(port, b"GET / HT")) for _ in range(10)]
        close = b"Host: x\r\nConnection: close\r\n\r\n"
        assert ask(port, b"GET / HTTP/1.1\r\n" + close).startswith(b"HTTP/1.1 200")
        assert len(guard._connections) <= 4
        assert rest_of(waiting[0]) == b""  # the oldest had to go
        held = [stack.enter_context(connect(port, b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")) for _ in range(4)]
        deadline = time.monotonic() + 5
        while len(guard._connections) - len(guard._waiting) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = ask(port, b"GET / HTTP/1.1\r\n" + close)
        assert refused.startswith(b"HTTP/1.1 503") and b"too many connections" in refused
        assert ask(port, b"GET /health HTTP/1.1\r\n" + close).startswith(b"HTTP/1.1 200")
        for one in held:
            one.close()
    lines = [record.getMessage() for record in caplog.records if "--max-connections" in record.getMessage()]
    assert lines == ["all 4 connections of the HTTP server are in use (--max-connections)"]


def test_without_files_the_oldest_connections_go(
    quick_sweeps: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(HttpLimits(max_connections=9)) as (port, _guard), caplog.at_level(logging.WARNING):
        waiting = connect(port)
        monkeypatch.setattr(http_guard, "is_out_of_files", lambda: True)
        assert rest_of(waiting) == b""
    assert "no files left to open (ulimit -n)" in caplog.text


def test_the_files_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    limits = [(200, 300)]
    monkeypatch.setattr(file_limit.resource, "getrlimit", lambda _which: limits[-1])
    monkeypatch.setattr(file_limit.resource, "setrlimit", lambda _which, pair: limits.append(pair))
    assert file_limit.raise_file_limit() == 300
    assert limits[-1] == (300, 300) and "only 300 files" in caplog.text
    assert http_guard.room_for_connections(4096) < 300
    assert "has room for" in caplog.text
    assert not file_limit.is_out_of_files()


@pytest.mark.parametrize("request_line", [b"POST / HTTP/1.1", b"POST / HTTP/1.0", b"HEAD / HTTP/1.1"])
@pytest.mark.parametrize("status", [200, 204])
@pytest.mark.parametrize("headers", [[], [(b"content-length", b"3")], [(b"transfer-encoding", b"chunked")]])
def test_answers_are_framed_as_by_h11(request_line: bytes, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    has_body = status != 204 and not request_line.startswith(b"HEAD")
    if status == 204 and headers:
        return  # no such answer

    def answer(connection: h11.Connection) -> list[bytes]:
        sent = []
        for _ in range(2):  # of one connection
            connection.receive_data(request_line + b"\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            while not isinstance(connection.next_event(), h11.EndOfMessage):
                pass
            sent.append(connection.send(h11.Response(status_code=status, headers=headers)))
            sent += [connection.send(h11.Data(data=data)) for data in ((b"a", b"", b"bc") if has_body else (b"",))]
            sent.append(connection.send(h11.EndOfMessage()))
            if connection.our_state is not h11.DONE:
                break
            connection.start_next_cycle()
        with pytest.raises(h11.LocalProtocolError):
            connection.send(h11.Data(data=b"too late"))
        return sent

    assert answer(GuardedConnection()) == answer(h11.Connection(h11.SERVER))
