"""Owns what a flag is: a field with its default, help, and the values that it may have by itself."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Limit(NamedTuple):
    """What a flag's number must be, as a check and as what stands behind "must"."""

    holds: Callable[[Any], bool]
    text: str


PORT = Limit(lambda value: 0 <= value <= 65535, "be a port number from 0 to 65535")
COUNT = Limit(lambda value: value >= 1, "be at least 1")
NOT_NEGATIVE = Limit(lambda value: value >= 0, "not be negative")
SECONDS = Limit(lambda value: value > 0, "be above 0")
SHARE = Limit(lambda value: 0 < value < 1, "be between 0 and 1")
PART = Limit(lambda value: 0 <= value <= 1, "be from 0 to 1")
CHUNK = Limit(lambda value: value == -1 or value >= 1, "be -1 or at least 1")


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    limit: Limit | None = None,
    aliases: Sequence[str] = (),
    repeatable: bool = False,
    several: bool = False,
) -> Any:
    """A field of ServerArgs whose metadata makes the command-line flag, and other spellings of it.

    Args:
        limit: what holds for a value that is given.
        repeatable: the flag may be given several times; the values are joined with commas.
        several: several values may stand behind the flag; the field is a tuple of them.
    """
    metadata = {"help": help, "choices": choices, "limit": limit, "aliases": aliases, "repeatable": repeatable}
    metadata["several"] = several
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """The command-line flag of a field: model_path -> --model-path."""
    return "--" + field_name.replace("_", "-")
