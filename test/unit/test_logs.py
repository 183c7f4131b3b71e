"""Log records: one line each, whatever they quote."""

import io
import logging
import time
from collections.abc import Iterator

import pytest
from ramet.srt.observability.logs import MAX_MESSAGE_CHARS, OneLineFormatter, Seldom, escape_text


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
