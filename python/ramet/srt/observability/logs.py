"""Owns how log lines look, the same in every process of an instance: one record, one line, whatever it quotes."""

import contextlib
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from ramet.srt.observability.request_record import current_request

MAX_MESSAGE_CHARS = 8192  # of a record; a caller can make its text much longer than any of ours
# Whatever a terminal or a reader of lines takes for more than a letter: controls, the line and paragraph separators,
# marks that turn the direction of writing, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_WORD = re.compile(r"[^\s\"=]+")
_encode_ascii = json.JSONEncoder(default=str).encode
_encode = json.JSONEncoder(default=str, ensure_ascii=False).encode
_TRACEBACK_INDENT = "    | "


def escape_text(text: str, max_chars: int = MAX_MESSAGE_CHARS) -> str:
    """The text in one line of printable characters: others as Python's escapes, and what is too long cut off."""
    num_chars = len(text)
    if num_chars <= max_chars and text.isprintable():
        return text
    shown = _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text[:max_chars])
    return shown if num_chars <= max_chars else f"{shown}… ({num_chars - max_chars} more characters)"


def shown(value: Any) -> str:
    """A value of name=value: words and numbers as they are, all else as JSON."""
    if isinstance(value, str):
        return value if value.isalnum() or _WORD.fullmatch(value) else _encode(value)
    return str(value) if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else _encode(value)


class OneLineFormatter(logging.Formatter):
    """Escapes what records quote of others. Only tracebacks have further lines, and none looks like a record.

    `extra={"costs": {...}}` of a record stands behind its message as name=value.
    """

    def __init__(self, fmt: str, datefmt: str | None = None) -> None:
        super().__init__(fmt, datefmt)
        self._second = (0, "")  # the last one, and how it is written

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """As logging does it, once in a second."""
        second = int(record.created)
        if second != self._second[0]:
            self._second = second, super().formatTime(record, datefmt)
        return self._second[1]

    def formatMessage(self, record: logging.LogRecord) -> str:
        max_chars = MAX_MESSAGE_CHARS if not getattr(record, "is_whole", False) else sys.maxsize
        if costs := getattr(record, "costs", None):
            record.message += " " + " ".join([f"{name}={shown(value)}" for name, value in costs.items()])
        record.message = escape_text(record.message, max_chars)
        if (request_id := request_id_of(record)) is not None:
            record.message += f" request_id={request_id}"
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return self._indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return self._indented(stack_info)

    @staticmethod
    def _indented(text: str) -> str:
        lines = (_TRACEBACK_INDENT + escape_text(line) for line in text.split("\n"))
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One JSON object for each record: time, level, process, logger, message, and what else the record has.

    `extra={"fields": {...}}` of a record are members of their own.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        message = record.getMessage()
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[:MAX_MESSAGE_CHARS]}… ({len(message) - MAX_MESSAGE_CHARS} more characters)"
        members = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": message,
        }
        if (request_id := request_id_of(record)) is not None:
            members["request_id"] = request_id
        members |= getattr(record, "fields", {})
        if record.exc_info:
            members["traceback"] = self.formatException(record.exc_info)
        return _encode_ascii(members)


class LinesHandler(logging.StreamHandler[Any]):
    """Writes each line at once, but those of a block of `written_together` at its end."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._held: list[str] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self._held is None:
            super().emit(record)
            return
        try:
            self._held.append(self.format(record))
        except Exception:  # noqa: BLE001 - as logging does it: a line that can't be made must not end what it is about
            self.handleError(record)

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Keep lines until the end of the block, and write them by one call."""
        self._held = []
        try:
            yield
        finally:
            lines, self._held = self._held, None
            if lines:
                with self.lock or contextlib.nullcontext():
                    self.stream.write("".join([f"{line}{self.terminator}" for line in lines]))
                    self.flush()


@contextlib.contextmanager
def written_together() -> Iterator[None]:
    """A block whose lines are written at its end: a call for each of hundreds costs more than what they say."""
    with contextlib.ExitStack() as stack:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, LinesHandler):
                stack.enter_context(handler.holding())
        yield


def request_id_of(record: logging.LogRecord) -> str | None:
    """Of the request that a record is about: what it says itself, or that which is under way here."""
    if (own := getattr(record, "request_id", None)) is not None:
        return str(own)
    request = current_request()
    return None if request is None or request.is_over else request.request_id


class Seldom(logging.Filter):
    """Lets a message through once in `period_s`, and says then how many like it were left out. Others always pass."""

    def __init__(self, period_s: float, *beginnings: str) -> None:
        super().__init__()
        self._period_s = period_s
        self._beginnings = beginnings
        self._next: dict[str, float] = {}
        self._num_left_out: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = self.kind(record)
        if kind is None:
            return True
        now = time.monotonic()
        if now < self._next.get(kind, 0.0):
            self._num_left_out[kind] = self._num_left_out.get(kind, 0) + 1
            return False
        self._next[kind] = now + self._period_s
        num_left_out = self._num_left_out.pop(kind, 0)
        if num_left_out:
            record.msg = f"{record.msg} ({num_left_out} more like this since the last line)"
        return True

    def kind(self, record: logging.LogRecord) -> str | None:
        """Messages of a kind count together; None for those that always pass."""
        return next((one for one in self._beginnings if str(record.msg).startswith(one)), None)


class SeldomFrom(Seldom):
    """The same for all that a library says, level by level.

    Args:
        library: its loggers' first name.
    """

    def __init__(self, period_s: float, library: str) -> None:
        super().__init__(period_s)
        self._library = library

    def kind(self, record: logging.LogRecord) -> str | None:
        return record.levelname if record.name.partition(".")[0] == self._library else None


def configure_logging(level: str, process: str, form: str = "text") -> None:
    """Log to stderr from `level` ("debug", …) on, with the `process` ("server", "scheduler 0", …) in each line.

    Args:
        form: "text", or "json" for JSON lines.
    """
    # What no line of ours has, and records look for all the same.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.logAsyncioTasks = False  # type: ignore[attr-defined]  # from Python 3.12 on
    handler = LinesHandler(sys.stderr)
    text = OneLineFormatter(f"[%(asctime)s {process}] %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    handler.setFormatter(JsonFormatter(process) if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "huggingface_hub", "asyncio", "uvicorn"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
