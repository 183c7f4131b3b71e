"""Owns reading an object of a config key by key: what nobody reads, and says something, is refused by its name."""

from collections.abc import Mapping
from typing import Any


class Section:
    """Reads the keys of an object, and refuses those that nobody has read."""

    def __init__(self, section: Mapping[str, Any], where: str):
        self.where = where
        self._left = dict(section)

    def take(self, name: str, default: Any = None) -> Any:
        value = self._left.pop(name, None)
        return default if value is None else value

    def says(self, name: str, *words: str) -> bool:
        """Whether a key, which stays unread, has one of these values."""
        return self._left.get(name) in words

    def ignore(self, *names: str) -> None:
        """Keys that say nothing of the computation."""
        for name in names:
            self._left.pop(name, None)

    def expect(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """A value that must be one of those served; absent or null, `default`."""
        value = self.take(name, default)
        if not any(type(value) is type(word) and value == word for word in allowed):
            words = " or ".join(repr(word) for word in allowed if word is not None)
            raise ValueError(f"{self.where}: {name} {value!r} is not supported; {words} is")
        return value

    def section(self, name: str) -> "Section | None":
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.where}: {name} must be an object; got {value!r}")
        return Section(value, f"{self.where}.{name}")

    def names(self, name: str) -> tuple[str, ...]:
        value = self.take(name, [])
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) and item for item in value):
            raise ValueError(f"{self.where}: {name} must be a list of names; got {value!r}")
        return tuple(value)

    @property
    def all_names(self) -> list[str]:
        """The keys that nobody has read."""
        return sorted(self._left)

    @property
    def left(self) -> list[str]:
        """The keys that nobody has read and that say something."""
        return sorted(name for name, value in self._left.items() if value not in (None, {}, [], False, ""))

    def finish(self) -> None:
        """Raise ValueError if a key that says something is left."""
        if left := self.left:
            raise ValueError(f"{self.where}: {', '.join(map(repr, left))} may change the computation and is not known")


def block_size(value: Any, where: str) -> tuple[int, int] | None:
    """Rows and columns of weight blocks, as a list or as "128x128"."""
    if value is None:
        return None
    if isinstance(value, str) and "x" in value:
        value = [int(part) if part.isascii() and part.isdigit() else part for part in value.split("x")]
    if not isinstance(value, list | tuple) or len(value) != 2 or any(type(n) is not int or n < 1 for n in value):
        raise ValueError(f"{where}: the size of weight blocks must be two positive integers; got {value!r}")
    return value[0], value[1]


def expect_known_cache(keys: Section) -> None:
    """The cache keeps the model's type, which is more exact than fp8; files made for narrower ones are refused."""
    if keys.says("kv_cache_scheme", "static", "dynamic"):  # AutoFP8's spelling
        keys.ignore("kv_cache_scheme")
    elif cache := keys.section("kv_cache_scheme"):
        cache.expect("num_bits", 8)
        cache.expect("type", "float")
