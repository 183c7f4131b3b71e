"""Owns the reading of single values of a config file: each has a type, a range and a default, or is refused by name."""

import math
from typing import Any

from ramet.srt.configs.harmless_keys import HARMLESS_KEYS, objections, short
from ramet.srt.configs.model_family import ModelFamily

LARGEST_SIZE = 2**31 - 1


class ConfigReader:
    """Reads a config by its family's published defaults, and knows which keys nobody has asked for.

    A missing key has the family's default. Null is not missing: it is an error but where the family gives it a meaning.
    All methods raise ValueError for a value of the wrong kind; the message names the file and the key.
    """

    def __init__(self, config: dict[str, Any], file: str, family: ModelFamily):
        self.config = config
        self.file = file
        self.family = family
        self._read = {"architectures", "model_type"}

    def has(self, name: str) -> bool:
        """Whether the family's computation depends on key `name`."""
        return name in self.family.defaults

    def take(self, *names: str) -> None:
        """Count keys as read whose values the caller judges itself."""
        self._read.update(names)

    def value(self, name: str) -> Any:
        """What the file, or else the family, has for `name`; unchecked."""
        self.take(name)
        if name not in self.config:
            return self.family.defaults.get(name)
        value = self.config[name]
        return self.family.null_means.get(name) if value is None else value

    def may_be_none(self, name: str) -> bool:
        """Whether None is a value of key `name` here: it is missing, or null and the family knows what that means."""
        return name not in self.config or name in self.family.null_means

    def integer(self, name: str, *, minimum: int = 1, maximum: int = LARGEST_SIZE) -> int:
        """An integer of at least `minimum`."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            words = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
            raise self.wrong(name, f"must be {words}", value)
        if value > maximum:
            raise self.wrong(name, f"must be at most {maximum}", value)
        return value

    def optional_integer(self, name: str, *, minimum: int = 1) -> int | None:
        """Like `integer`, for a key that may have no value."""
        if self.value(name) is None and self.may_be_none(name):
            return None
        return self.integer(name, minimum=minimum)

    def number(self, name: str, *, zero: bool = False) -> float:
        """A finite number above zero; with `zero`, zero too."""
        value = self.value(name)
        if not is_finite(value) or value < 0 or (value == 0 and not zero):
            raise self.wrong(name, "must be a number of at least 0" if zero else "must be a positive number", value)
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """Like `number`, for a key that may have no value; None for one that the family doesn't have, as of `flag`."""
        if not self.has(name):
            return None
        return None if self.value(name) is None and self.may_be_none(name) else self.number(name)

    def flag(self, name: str) -> bool:
        """True or false; false for a key that the family doesn't have, whose value is left to `refuse_the_unread`."""
        if not self.has(name):
            return False
        value = self.value(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false", value)
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """One of `allowed`."""
        value = self.value(name)
        if not isinstance(value, str) or value not in allowed:
            raise self.wrong(name, f"must be one of {', '.join(allowed)}", value)
        return value

    def wrong(self, name: str, expected: str, value: Any) -> ValueError:
        """The error for a key that `expected` ("must be …") is not true of."""
        return ValueError(f"{self.file}: {name!r} {expected}; got {short(value)}")

    def refuse_the_unread(self) -> None:
        """Raise ValueError, with names and reasons, if a key that nobody read may change what the model computes."""
        harmless = {**HARMLESS_KEYS, **self.family.harmless}
        reasons = objections({name: self.config[name] for name in self.config if name not in self._read}, harmless)
        if reasons:
            raise ValueError(f"{self.file} ({self.family.architecture}): {'; '.join(reasons)}")


def is_finite(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False
