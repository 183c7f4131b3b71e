"""What is written down of requests: which of them have a line, and what is in it at each level."""

import asyncio
import json
import logging
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ramet.srt.entrypoints.http import logged_text, request_log
from ramet.srt.entrypoints.http.http_counts import HttpCounts
from ramet.srt.entrypoints.http.http_front import FrontMiddleware
from ramet.srt.entrypoints.http.request_log import Exchange, LogConfig, RequestLines, RequestLogMiddleware, Trace
from ramet.srt.managers.generation import RunningSequence
from ramet.srt.managers.io_struct import FinishReason, TokenizedGenerateReqInput
from ramet.srt.managers.prepare_requests import SequenceInput
from ramet.srt.observability.logs import JsonFormatter, OneLineFormatter
from ramet.srt.observability.request_record import RequestRecord, current_request
from ramet.srt.sampling.sampling_params import SamplingParams
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

LONG = "x" * 5000


def a_sequence() -> RunningSequence:
    request = TokenizedGenerateReqInput(rid="r", input_ids=[1, 2, 3], sampling_params=SamplingParams(temperature=0.5))
    sequence = RunningSequence(request=request, created_s=1.0, version_before="v1")
    sequence.output_ids, sequence.text, sequence.queue_time_s, sequence.prefill_time_s = [4, 5], LONG, 0.25, 0.5
    sequence.finish_reason = FinishReason(type="stop")
    return sequence


def an_exchange() -> Exchange:
    """One that has ended just now."""

    async def send(_message: Message) -> None:
        pass

    return Exchange({"type": "http", "headers": [], "http_version": "1.1", "path": "/a"}, send)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    record = current_request()
    assert record is not None
    if scope["path"] in ("/bad", "/health"):
        error = {"message": 'no "such"\nthing', "type": "t", "param": None, "code": None}
        await JSONResponse({"error": error}, 404 if scope["path"] == "/bad" else 503)(scope, receive, send)
    elif scope["path"] == "/broken":
        record.error = "it broke off"
        await JSONResponse({})(scope, receive, send)
    else:
        generation = SimpleNamespace(rid="r", sequences=[a_sequence()])
        record.generations.append(([SequenceInput(text=LONG)], generation))
        await JSONResponse({"a": 1})(scope, receive, send)


async def ask(path: str, counts: HttpCounts | None = None, *, method: str = "GET", **config: Any) -> httpx.Response:
    counts = counts or HttpCounts("m")
    logged = RequestLogMiddleware(app, counts, ["/a", "/bad"], LogConfig(**config))
    transport = httpx.ASGITransport(FrontMiddleware(logged, "/root"), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
        answer = await client.request(method, path, headers={"X-Request-Id": "id-1", "User-Agent": 'a "b"'})
    logged.flush()
    return answer


async def test_only_refused_ones_have_a_line_by_themselves(lines: list[logging.LogRecord]) -> None:
    for path in ("/a", "/health"):
        await ask(path)
    assert not lines
    await ask("/bad?x=1")
    await ask("/broken")
    refused, broken = lines
    assert refused.getMessage() == 'refused: GET /bad?x=… from 127.0.0.1: 404 no "such"\nthing'
    assert broken.getMessage() == "refused: GET /broken from 127.0.0.1: 200 it broke off"
    assert refused.fields["error"] == 'no "such"\nthing' and refused.fields["status"] == 404


async def test_the_combined_log_format_with_what_it_cost(lines: list[logging.LogRecord]) -> None:
    await ask("/root/a/?q=1", method="HEAD", log_requests=True)
    await ask("/bad", log_requests=True)
    done, refused = map(OneLineFormatter("%(message)s").format, lines)
    assert '] "HEAD /root/a/?q=… HTTP/1.1" 200 7 "-" "a \\"b\\"" seconds=' in done
    assert done.endswith(
        "rid=r prompt_tokens=3 cached_tokens=0 completion_tokens=2 queue_seconds=0.25 ttft_seconds=0.75 "
        "finish_reason=stop weight_version=v1 request_id=id-1"
    )
    assert refused.endswith('error="no \\"such\\"\\nthing" request_id=id-1')
    assert "inputs" not in lines[0].fields and "sampling_params" not in lines[0].fields


@pytest.mark.parametrize(("level", "num_chars"), [(1, None), (2, 2048), (3, 5000)])
async def test_levels(lines: list[logging.LogRecord], level: int, num_chars: int | None) -> None:
    await ask("/a", log_requests=True, level=level)
    fields = lines[0].fields
    assert fields["sampling_params"]["temperature"] == 0.5
    if num_chars is None:
        assert "inputs" not in fields and "outputs" not in fields
        return
    assert fields["inputs"] == fields["outputs"] == ["x" * num_chars]
    text = OneLineFormatter("%(message)s").format(lines[0])
    assert ("more characters" not in text) and text.count("x" * num_chars) == 2
    assert json.loads(JsonFormatter("server").format(lines[0]))["inputs"] == ["x" * num_chars]


async def test_the_line_of_a_client_that_has_gone_waits_for_what_was_computed(
    lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "WRITE_PERIOD_S", 0.001)
    sequence, other = a_sequence(), a_sequence()
    sequence.finish_reason, sequence.output_ids = None, []
    written = RequestLines(0)
    record = RequestRecord("id")
    record.generations.append(([], SimpleNamespace(rid="r", sequences=[sequence])))
    written.add(an_exchange(), record, None)
    done = RequestRecord("done")
    done.generations.append(([], SimpleNamespace(rid="s", sequences=[other])))
    written.add(an_exchange(), done, None)
    async with asyncio.timeout(10):
        while not lines:
            await asyncio.sleep(0.001)
        assert [line.fields["rid"] for line in lines] == ["s"]
        sequence.finish_reason, sequence.output_ids = FinishReason(type="abort"), [1, 2, 3]
        while len(lines) < 2:
            await asyncio.sleep(0.001)
    assert lines[1].fields["completion_tokens"] == 3 and lines[1].fields["finish_reason"] == "abort"


async def test_a_line_waits_for_no_end_that_does_not_come(
    lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "WRITE_PERIOD_S", 0.001)
    monkeypatch.setattr(request_log, "END_TIMEOUT_S", 0.01)
    sequence = a_sequence()
    sequence.finish_reason, sequence.output_ids = None, []
    record = RequestRecord("id")
    record.generations.append(([], SimpleNamespace(rid="r", sequences=[sequence])))
    RequestLines(0).add(an_exchange(), record, None)
    async with asyncio.timeout(10):
        while not lines:
            await asyncio.sleep(0.001)
    fields = lines[0].fields
    assert (fields["finish_reason"], fields["ttft_seconds"], fields["queue_seconds"]) == ("none", 0.0, 0.25)


@pytest.mark.parametrize(("path", "num_active"), [("/a", 1), ("/metrics", 0), ("/health", 0), ("/ready", 0)])
async def test_scrapes_and_probes_are_not_under_way(path: str, num_active: int) -> None:
    counts, seen = HttpCounts("m"), []

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(counts.num_active)
        await JSONResponse({})(scope, receive, send)

    logged = RequestLogMiddleware(look, counts, ["/a"], LogConfig())
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(FrontMiddleware(logged, "")), base_url="http://h"
    ) as client:
        await client.get(path)
    assert (seen, counts.num_active) == ([num_active], 0)


async def test_counts_by_route_and_status() -> None:
    counts = HttpCounts("m")
    for path in ("/a", "/root/a", "/bad", "/made/up", "/other"):
        await ask(path, counts)
    await ask("/a", counts, method="BREW")
    requests, responses, active = counts.collect()
    found = {tuple(sample.labels.values())[1:]: sample.value for sample in responses.samples}
    assert found == {("/a", "GET", "200"): 2, ("/bad", "GET", "404"): 1, ("other", "GET", "200"): 2,
                     ("/a", "other", "200"): 1}  # fmt: skip
    assert sum(sample.value for sample in requests.samples) == 6 and active.samples[0].value == 0


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        ("messages must be a list, not 'my private words about'", "messages must be a list, not '…'"),
        ("messages must be a list, not 'secret'", "messages must be a list, not '…'"),
        ("messages must be a list, not 'my private words that are cut of", "messages must be a list, not '…'"),
        ("role can't be 'it\\'s \"mine\"'", "role can't be '…'"),
        ('prompt must be a string, not "it\'s mine"', 'prompt must be a string, not "…"'),
        ("metadata['my private key'] must be given", "metadata['…'] must be given"),
        ("there is no response 'resp_1f' (any more)", "there is no response 'resp_1f' (any more)"),
        ("the model 'Org/x-7B' does not exist; this instance serves 'tiny'",) * 2,
        (f"the model {'x' * 900!r} does not exist; this instance serves 'tiny'",
         "the model '…' does not exist; this instance serves 'tiny'"),
        ("temperature must be at least 0, not -1", "temperature must be at least 0, not -1"),
        ("the body can't be parsed: it doesn't end", "the body can't be parsed: it doesn't end"),
        ("w " * 500, "w " * 200 + "… (600 more characters)"),
    ],
)  # fmt: skip
def test_what_users_write_is_taken_out_of_errors(error: str, logged: str) -> None:
    assert logged_text.without_texts(error) == logged


async def wordy_app(scope: Scope, receive: Receive, send: Send) -> None:
    error = {"message": "messages must be a list, not 'my private words'", "type": "t", "param": None, "code": None}
    await JSONResponse({"error": error}, 400)(scope, receive, send)


@pytest.mark.parametrize(
    ("config", "is_shown"),
    [
        ({}, False),
        ({"log_requests": True, "level": 1}, False),
        ({"log_requests": True, "level": 2}, True),
    ],
)
async def test_below_level_2_no_line_or_span_has_what_users_write(
    lines: list[logging.LogRecord], config: dict[str, Any], is_shown: bool
) -> None:
    spans: list[str | None] = []
    trace = Trace(lambda _name, _headers: object(), lambda _exchange, _record, error: spans.append(error))
    logged = RequestLogMiddleware(wordy_app, HttpCounts("m"), ["/a"], LogConfig(**config), trace)
    transport = httpx.ASGITransport(FrontMiddleware(logged))
    async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
        target = f"/a/{'p' * 4000}?api_key=QUERYSECRET&SECRETALONE&x%20y=SECRET"
        await client.get(target, headers={"Referer": "http://ui/page?key=SECRET#SECRET", "User-Agent": "u" * 4000})
    logged.flush()
    (line,) = lines
    for form in (OneLineFormatter("%(message)s"), JsonFormatter("server")):
        text = form.format(line)
        assert ("my private words" in text) == is_shown and len(text) < 4000 and "SECRET" not in text
    assert [("private" in str(error)) for error in spans] == [is_shown]


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("", ""), ("rank=1", "?rank=…"), ("api_key=S&rank=2", "?api_key=…&rank=…"), ("S", "?…"), ("a b=S", "?…"),
        ("a=b=c", "?a=…"),
    ],
)  # fmt: skip
def test_the_names_of_a_query_are_logged_and_not_its_values(query: str, shown: str) -> None:
    assert logged_text.logged_target("/p", query) == f"/p{shown}"
