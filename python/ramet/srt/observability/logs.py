"""Owns how log lines look, the same in every process of an instance: one record, one line, whatever it quotes."""

import logging
import re
import sys
import time
from typing import Any

MAX_MESSAGE_CHARS = 8192  # of a record; a caller can make its text much longer than any of ours
# Whatever a terminal or a reader of lines takes for more than a letter: controls, the line and paragraph separators,
# marks that turn the direction of writing, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_TRACEBACK_INDENT = "    | "


def escape_text(text: str, max_chars: int = MAX_MESSAGE_CHARS) -> str:
    """The text in one line of printable characters: others as Python's escapes, and what is too long cut off."""
    num_chars = len(text)
    shown = _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text[:max_chars])
    return shown if num_chars <= max_chars else f"{shown}… ({num_chars - max_chars} more characters)"


class OneLineFormatter(logging.Formatter):
    """Escapes what records quote of others. Only tracebacks have further lines, and none looks like a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape_text(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return self._indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return self._indented(stack_info)

    @staticmethod
    def _indented(text: str) -> str:
        lines = (_TRACEBACK_INDENT + escape_text(line) for line in text.split("\n"))
        return "\n".join(lines)


class Seldom(logging.Filter):
    """Lets a message through once in `period_s`, and says then how many like it were left out. Others always pass."""

    def __init__(self, period_s: float, *beginnings: str) -> None:
        super().__init__()
        self._period_s = period_s
        self._beginnings = beginnings
        self._next: dict[str, float] = {}
        self._num_left_out: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        beginning = next((one for one in self._beginnings if str(record.msg).startswith(one)), None)
        if beginning is None:
            return True
        now = time.monotonic()
        if now < self._next.get(beginning, 0.0):
            self._num_left_out[beginning] = self._num_left_out.get(beginning, 0) + 1
            return False
        self._next[beginning] = now + self._period_s
        num_left_out = self._num_left_out.pop(beginning, 0)
        if num_left_out:
            record.msg = f"{record.msg} ({num_left_out} more like this since the last line)"
        return True


def configure_logging(level: str, process: str) -> None:
    """Log to stderr from `level` ("debug", …) on, with the `process` ("server", "scheduler 0", …) in each line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        OneLineFormatter(f"[%(asctime)s {process}] %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "huggingface_hub", "asyncio", "uvicorn"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
