"""Owns the reading of a call that is written as a JSON object: {"name": …, "arguments": {…}}."""

import json
from collections.abc import Generator
from typing import Any

from ramet.srt.text.text_machine import Malformed, Waiting
from ramet.srt.text.tool_calls.parser import ToolCallParser

ARGUMENT_KEYS = ("arguments", "parameters")


class JsonCallParser(ToolCallParser):
    """Its calls are JSON objects. Other keys than these count for nothing."""

    knows_keys_only: tuple[str, ...] | None = None  # an object that begins with another key is no call

    def _read_call_object(self) -> Waiting:
        """Read one call; arguments behind the name come as they are written.

        Raises:
            Malformed: if it is no call of a known function.
        """
        name: str | None = None
        arguments: str | None = None
        has_started = False
        yield from self._expect_object()
        self._at += 1
        is_first = True
        while not (yield from self._ends_object(is_first)):
            is_first = False
            key = yield from self._read_key()
            if key == "name" and name is None:
                name = self._check_name(load_json((yield from self._json())))
            elif key in ARGUMENT_KEYS and not has_started and arguments is None:
                if name is not None and (yield from self._comes("{")) is not None:
                    has_started = True
                    self._start(name)
                    yield from self._json(self._arguments)
                    self._end()
                else:
                    arguments = as_arguments((yield from self._json()))
            elif self.knows_keys_only is not None and key not in self.knows_keys_only and not has_started:
                raise Malformed
            else:
                yield from self._json()
        if not has_started:
            if name is None:
                raise Malformed
            self._start(name)
            self._arguments(arguments or "{}")
        self._end()

    def _ends_object(self, is_first: bool) -> Generator[None, None, bool]:
        """Read the end of the object, or what comes before its next key."""
        yield from self._skip_space()
        if is_first and (yield from self._comes("}")) is None:
            return False
        sign = yield from self._take(",", "}")
        if sign is None:
            raise Malformed
        return sign == "}"

    def _read_key(self) -> Generator[None, None, str]:
        yield from self._skip_space()
        if (yield from self._comes('"')) is None:
            raise Malformed
        key = load_json((yield from self._json()))
        yield from self._skip_space()
        yield from self._expect(":")
        yield from self._skip_space()
        return str(key)


def as_arguments(text: str) -> str:
    """Arguments in any form that models give them, as the JSON text of an object.

    Raises:
        Malformed: if they are something else than an object, nothing, or a text with one of these.
    """
    value = load_json(text)
    if isinstance(value, str):
        text = value.strip()
        value = load_json(text) if text else None
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise Malformed
    return text if is_unicode(text) else json.dumps(value)


def load_json(text: str) -> Any:
    """The value of a JSON text. Raises Malformed if it is none, or one that Python can't hold."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Malformed from None


def write_json(value: Any) -> str:
    """The JSON text of a value. Raises Malformed if JSON has no such value."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if is_unicode(text) else json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        raise Malformed from None


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: escapes may make lone surrogates, which can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
