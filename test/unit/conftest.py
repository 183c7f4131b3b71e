"""Owns what several unit tests look at: the lines that Ramet logs."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[logging.LogRecord]]:
    """The records of a test, as they come."""
    caplog.set_level("INFO", logger="ramet")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("ramet").addHandler(handler)
    yield records
    logging.getLogger("ramet").removeHandler(handler)
