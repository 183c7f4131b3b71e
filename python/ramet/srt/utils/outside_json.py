"""Owns the reading of JSON that somebody else has written: whatever is wrong with it is one kind of error."""

from typing import Annotated, TypeVar

import msgspec

Value = TypeVar("Value")

# Numbers that fit into every message that they are handed on in. JSON has others, and so has Python.
Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


def decode_json(data: str | bytes | bytearray, kind: type[Value]) -> Value:
    """Raises ValueError if `data` is no JSON, something else than `kind`, or nested more deeply than can be read."""
    try:
        return msgspec.json.decode(data, type=kind)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
