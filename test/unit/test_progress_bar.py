"""How long work shows how far it is: drawn in a terminal, in lines elsewhere."""

import io
import logging
import sys
import threading
import time

import pytest
from ramet.srt.observability import progress_bar as module
from ramet.srt.observability.progress_bar import BYTES, allow_bars, progress_bar


@pytest.fixture(autouse=True)
def may_not_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each test, whatever others of this process have allowed, and behind it."""
    monkeypatch.setitem(module._settings, "bars", False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.set_level("INFO", logger="ramet")
    with progress_bar(8_000_000_000, "reading weights", **BYTES) as advance:
        for _ in range(2):
            time.sleep(0.06)
            threads = [threading.Thread(target=advance, args=(2_000_000_000,)) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    return [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]


def test_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_PERIOD_S", 0.02)
    monkeypatch.setattr(sys, "stderr", errors := io.StringIO())
    lines = work(caplog)
    assert 1 <= len(lines) <= 4 and "\r" not in errors.getvalue()
    assert all(line.startswith("reading weights: ") and " of 8.000 GB after " in line for line in lines)


def test_nothing_of_what_is_done_at_once(caplog: pytest.LogCaptureFixture) -> None:
    assert work(caplog) == []


def test_a_bar_in_a_terminal(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert work(caplog) == [] and terminal.getvalue() == "", "not of a process that may not draw"
    allow_bars(True)
    assert work(caplog) == []
    assert "reading weights" in terminal.getvalue() and "/8.00G [" in terminal.getvalue()
