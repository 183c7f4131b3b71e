"""Owns how long work shows how far it is: a bar in a terminal, a line of the log now and then elsewhere."""

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)

LINE_PERIOD_S = 10.0  # between two lines; what is done sooner has none
BYTES = {"unit": "B", "unit_scale": True, "unit_divisor": 1000}
_settings = {"bars": False}


def allow_bars(allowed: bool) -> None:
    """Whether this process may draw on the terminal; of several that share one, only one should."""
    _settings["bars"] = allowed


@contextlib.contextmanager
def progress_bar(total: int, what: str, **units: Any) -> Iterator[Callable[[int], None]]:
    """A function to be called, from any thread, with what has been done of `total` since the last call.

    Args:
        what: is done, as in "reading weights".
        units: `BYTES`, or tqdm's own words for what is counted.
    """
    lock = threading.Lock()
    with bar_class()(total=total, desc=what, **units) as bar:

        def advance(number: int) -> None:
            with lock:
                bar.update(number)

        yield advance


@cache
def _classes() -> tuple[type[Any], type[Any]]:
    from tqdm import tqdm  # only work that takes its time needs it

    class Bar(tqdm):
        """In a terminal."""

        monitor_interval = 0  # no thread of its own

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{"file": sys.stderr, "leave": False} | options)

    class Lines(tqdm):
        """In the log."""

        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            own = {"file": io.StringIO(), "mininterval": LINE_PERIOD_S, "delay": LINE_PERIOD_S, "leave": False}
            super().__init__(*args, **options | own)

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # noqa: ARG002 - tqdm names it
            """A line, instead of drawing; the empty one that would clear a bar is none."""
            if msg is None:
                values = self.format_dict
                done, total = (self._amount(values[name]) for name in ("n", "total"))
                logger.info("%s: %s of %s after %.0f s", values["prefix"], done, total, values["elapsed"])
            return True

        def _amount(self, number: float | None) -> str:
            return "?" if number is None else f"{number / 1e9:.3f} GB" if self.unit == "B" else f"{number:g}"

    for kind in (Bar, Lines):
        kind.set_lock(threading.RLock())
    return Bar, Lines


def shows_bars() -> bool:
    """Whether there is a terminal that this process may draw on."""
    return _settings["bars"] and sys.stderr.isatty()


def bar_class() -> type[Any]:
    """A class as tqdm's, for libraries that show progress by one."""
    bar, lines = _classes()
    return bar if shows_bars() else lines
