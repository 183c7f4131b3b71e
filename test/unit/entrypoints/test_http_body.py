"""Request bodies: their size, their number of values, what all take together, and the look at large ones."""

import asyncio
import io
import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from ramet.srt.entrypoints import body_process
from ramet.srt.entrypoints.http import http_body
from ramet.srt.entrypoints.http.body_check import LENGTH, BodyChecker, BodyQuestion, BodyVerdict
from ramet.srt.entrypoints.http.http_body import FREE_VALUES, MAX_VALUES, BodyMiddleware
from ramet.srt.errors import RequestError, ServiceError

GENERATE = "/generate"


class Checker:
    """Stands for the helper processes."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    async def check(self, path: str, pieces: Sequence[bytes], max_req_len: int) -> None:
        self.seen.append((path, sum(map(len, pieces))))
        if b"bad" in pieces[0]:
            raise RequestError("it is bad", param="text")


class Call:
    """One request to the middleware, with an app behind it that reads the body and waits for `answer`."""

    def __init__(self, middleware: BodyMiddleware, path: str, pieces: Sequence[bytes], headers: dict[str, str]) -> None:
        self.middleware = middleware
        self.messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        self.messages.append({"type": "http.request", "body": b"", "more_body": False})
        headers = {"content-type": "application/json"} | headers
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self.scope = {"type": "http", "path": path, "headers": encoded, "method": "POST", "app_body": b""}
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        return self.messages.pop(0) if self.messages else {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def run(self) -> int | None:
        await self.middleware(self.scope, self.receive, self.send)
        return self.sent[0]["status"] if self.sent else None


class App:
    """Reads the body; answers once `may_answer` is set."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.body = b""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.body = b""
        while (message := await receive())["type"] == "http.request":
            self.body += message["body"]
            if not message["more_body"]:
                break
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})


def status_of(path: str, *pieces: bytes, app: App | None = None, **headers: str) -> int | None:
    middleware = BodyMiddleware(app or App(), Checker(), lambda: 100)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.run(Call(middleware, path, pieces, named).run())


def test_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App()
    assert status_of(GENERATE, b"ab", b"cd", app=app) == 200
    assert app.body == b"abcd"
    assert status_of(GENERATE, content_length=str(65 << 20)) == 413
    assert status_of(GENERATE, content_length="1" * 5000) == 413
    assert status_of(GENERATE, *[b"x" * (1 << 20)] * 65) == 413  # without a length
    assert status_of("/abort_request", b"x" * (2 << 20)) == 413
    assert status_of("/abort_request", b"[" * 5000) == 400
    assert status_of(GENERATE, b"," * (MAX_VALUES + 1)) == 413
    assert status_of(GENERATE, b"{}", content_encoding="gzip") == 415


def test_a_body_is_said_to_be_json() -> None:
    for good in ("application/json", "application/json; charset=utf-8", "Application/JSON", "application/problem+json"):
        assert status_of(GENERATE, b"{}", content_type=good) == 200
    for bad in ("", "text/plain", "application/x-www-form-urlencoded", "text/json", "json"):
        assert status_of(GENERATE, b"{}", content_type=bad) == 415
        assert status_of(GENERATE, b"", content_type=bad) == 200  # what has no body needs no type


def test_a_client_that_goes_while_it_sends_gets_nothing() -> None:
    middleware = BodyMiddleware(App(), Checker(), lambda: 100)
    call = Call(middleware, GENERATE, [b"ab"], {})
    call.messages.pop()
    assert asyncio.run(call.run()) is None


def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_body, "MAX_ALL_BODIES_BYTES", 1 << 20)

    async def run() -> None:
        app = App()
        app.may_answer.clear()
        middleware = BodyMiddleware(app, Checker(), lambda: 100)
        large = [b"x" * (400 << 10)]
        calls = [asyncio.create_task(Call(middleware, GENERATE, large, {}).run()) for _ in range(5)]
        small = asyncio.create_task(Call(middleware, GENERATE, [b"{}"], {}).run())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        app.may_answer.set()
        statuses = [await call for call in calls]
        assert sorted(statuses) == [200, 200, 200, 503, 503]
        assert await small == 200
        assert await Call(middleware, GENERATE, large * 2, {}).run() == 200  # all has been given back

    asyncio.run(run())


def test_only_large_ones_are_looked_at_beside() -> None:
    checker = Checker()
    middleware = BodyMiddleware(App(), checker, lambda: 100)
    for body, status in ((b"bad", 200), (b"bad" + b"," * (FREE_VALUES + 1), 400), (b"x" * (2 << 20), 200)):
        assert asyncio.run(Call(middleware, GENERATE, [body], {}).run()) == status
    assert [size for _, size in checker.seen] == [FREE_VALUES + 4, 2 << 20]


def look_at(path: str, body: Any) -> str:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    question = BodyQuestion(path=path, num_bytes=len(data), vocab_size=300, max_req_len=5000)
    verdict = body_process.look_at(question, data)
    return "" if verdict.message is None else f"{verdict.param} {verdict.code}: {verdict.message}"


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], **more}


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (GENERATE, {"input_ids": [1] * 4000}, ""),
        (GENERATE, {"input_ids": [1.0] * 4000}, ""),
        (GENERATE, {"input_ids": [1] * 5000}, f"input_ids {LONG}"),
        (GENERATE, {"input_ids": [1.5] * 60_000}, "input_ids None"),
        (GENERATE, {"input_ids": [[1.5]] * 4000}, "input_ids None"),
        (GENERATE, {"text": ["x"] * 4097}, "text None"),
        (GENERATE, {"text": "a" * 2_000_000}, f"text {LONG}"),
        (GENERATE, {"text": "a", "sampling_params": {"stop": ["x"] * 60_000}}, "stop None"),
        (GENERATE, {"text": "a", "sampling_params": {"logit_bias": dict.fromkeys(range(5000), 1)}}, "logit_bias None"),
        (GENERATE, {"text": "a", "sampling_params": {"n": 129}}, "n None"),
        (GENERATE, b"[" * 100_000, "nested too deeply"),
        (GENERATE, b'{"text": "x",', "not valid JSON"),
        (GENERATE, b'{"text": "\xff"}', "not text in UTF-8"),
        (COMPLETIONS, {"model": "m", "prompt": [1] * 5000}, f"prompt {LONG}"),
        (COMPLETIONS, {"model": "m", "prompt": [[1] * 4000] * 3}, ""),
        (COMPLETIONS, {"model": "m", "prompt": "x", "logit_bias": dict.fromkeys(range(9000), "x")}, "logit_bias None"),
        (CHAT, chat("hi"), ""),
        (CHAT, chat([{"type": "text", "text": "x"}] * 5000), "messages None"),
        (CHAT, chat([{}] * 5000), "messages None"),
        (CHAT, chat("x" * 2_000_000), f"messages {LONG}"),
        (CHAT, chat("hi", metadata=dict.fromkeys(map(str, range(9000)), 1)), ""),
        (CHAT, chat("hi", chat_template_kwargs={"a": [[]] * 50_000}), "chat_template_kwargs None"),
        (CHAT, chat("hi", functions=[{}] * 9000), "functions unsupported_parameter"),
    ],
)  # fmt: skip
def test_what_is_found_in_large_bodies(path: str, body: Any, words: str) -> None:
    verdict = look_at(path, body)
    assert verdict == "" if words == "" else words in verdict
    assert len(verdict) < 300


async def test_the_process_finds_what_the_server_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []

    async def refuse(*_command: str, env: dict[str, str], **_options: Any) -> None:
        started.append(env)
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setenv("PYTHONPATH", "/of/the/user")
    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
    with pytest.raises(ServiceError, match="can't be started: .* temporarily unavailable"):
        await BodyChecker(vocab_size=8).check(GENERATE, [b"{}"], 100)
    assert started[0]["PYTHONPATH"].split(":")[1] == "/of/the/user"


def test_a_name_that_is_no_text_is_quoted() -> None:
    body = json.dumps({"text": "a", "sampling_params": {"\ud800x": 1}}).encode()
    head = msgspec.msgpack.encode(BodyQuestion(path=GENERATE, num_bytes=len(body), vocab_size=8, max_req_len=100))
    target = io.BytesIO()
    assert body_process.answer_next(io.BytesIO(LENGTH.pack(len(head)) + head + body), target)
    verdict = msgspec.msgpack.decode(target.getvalue()[LENGTH.size :], type=BodyVerdict)
    assert verdict.param == r"\ud800x"
