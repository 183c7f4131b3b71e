"""Log records: one line each, whatever they quote."""

import contextvars
import io
import json
import logging
import sys
import time
from collections.abc import Iterator
from datetime import datetime

import pytest
from ramet.srt.observability.logs import (
    MAX_MESSAGE_CHARS,
    JsonFormatter,
    OneLineFormatter,
    Seldom,
    SeldomFrom,
    escape_text,
)
from ramet.srt.observability.request_record import RequestRecord, begin_request


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    logger, text = logging.getLogger("test of logs"), io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(OneLineFormatter("[server] %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, text
    logger.removeHandler(handler)


def test_what_callers_write_stays_in_its_line(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, text = log
    logger.warning("request %s: done", "a\n[server] ERROR all is lost\r\x1b[31m\x00\u202e\u2028\ud800é植")
    (line,) = text.getvalue().splitlines()
    escaped = r"a\n[server] ERROR all is lost\r\x1b[31m\x00\u202e\u2028\ud800é植"
    assert line == f"[server] WARNING request {escaped}: done"


def test_tracebacks_are_indented(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, text = log
    try:
        raise ValueError("bad\n[server] ERROR all is lost \x1b[2J")
    except ValueError:
        logger.exception("it failed")
    first, *rest = text.getvalue().splitlines()
    assert first == "[server] ERROR it failed"
    assert rest[-1] == r"    | [server] ERROR all is lost \x1b[2J"
    assert all(line.startswith("    | ") for line in rest)


def test_long_ones_are_cut() -> None:
    assert escape_text("x" * 10) == "x" * 10
    cut = escape_text("\n" * (MAX_MESSAGE_CHARS + 5))
    assert cut == r"\n" * MAX_MESSAGE_CHARS + "… (5 more characters)"


def test_seldom(log: tuple[logging.Logger, io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    logger, text = log
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    seldom = Seldom(10, "too many")
    logger.addFilter(seldom)
    for _ in range(3):
        logger.warning("too many %s", "callers")
        logger.warning("else")
    now[0] += 11
    logger.warning("too many %s", "callers")
    logger.removeFilter(seldom)
    lines = [line.removeprefix("[server] WARNING ") for line in text.getvalue().splitlines()]
    assert lines == [
        "too many callers", "else", "else", "else", "too many callers (2 more like this since the last line)"
    ]  # fmt: skip


def test_json_lines() -> None:
    formatter = JsonFormatter("scheduler 3")
    logger = logging.getLogger("test of logs")
    try:
        raise ValueError("bad\nline")
    except ValueError:
        record = logger.makeRecord("n", logging.ERROR, "f", 1, "a %s\n\ud800", ("b",), sys.exc_info())
    record.fields = {"status": 404, "odd": {1, 2}}
    line = formatter.format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["process"], found["level"], found["message"], found["status"]) == (
        "scheduler 3", "ERROR", "a b\n\ud800", 404,
    )  # fmt: skip
    assert datetime.fromisoformat(found["time"]).timestamp() == pytest.approx(record.created, abs=0.01)
    assert "bad\nline" in found["traceback"] and "request_id" not in found


def test_lines_of_a_request_bear_its_id() -> None:
    record = logging.getLogger("test of logs").makeRecord("n", logging.INFO, "f", 1, "done", (), None)

    def both() -> tuple[str, str]:
        begin_request(RequestRecord("id-7"))
        return OneLineFormatter("%(message)s").format(record), json.loads(JsonFormatter("p").format(record))[
            "request_id"
        ]

    def afterwards() -> str:
        begin_request(RequestRecord("id-7", is_over=True))
        return OneLineFormatter("%(message)s").format(record)

    assert contextvars.copy_context().run(both) == ("done request_id=id-7", "id-7")
    assert contextvars.copy_context().run(afterwards) == "done", "of work that all requests share"
    assert OneLineFormatter("%(message)s").format(record) == "done"


def test_what_a_library_repeats_is_seldom_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("ramet.srt.observability.logs.time.monotonic", lambda: now)
    seldom = SeldomFrom(60.0, "opentelemetry")

    def passes(name: str, level: int, text: str) -> str | None:
        record = logging.LogRecord(name, level, __file__, 0, text, (), None)
        return record.getMessage() if seldom.filter(record) else None

    grpc, sdk = "opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal"
    assert passes(grpc, logging.WARNING, "transient") == "transient"
    assert passes(grpc, logging.ERROR, "failed") == "failed", "another level is another line"
    assert [passes(one, logging.ERROR, "failed again") for one in (grpc, sdk, grpc)] == [None] * 3
    assert passes("ramet.x", logging.ERROR, "ours") == passes("opentelemetryx", logging.ERROR, "ours") == "ours"
    now += 60.0
    assert passes(sdk, logging.ERROR, "failed") == "failed (3 more like this since the last line)"
