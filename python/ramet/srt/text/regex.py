"""Owns the writing of texts as regular expressions, in the dialect of the grammar library (Rust's)."""

import re
from collections.abc import Iterable


def escape(text: str) -> str:
    """A text as a regex, which may also stand between slashes."""
    return re.sub(r"[\\.+*?()|\[\]{}^$/]", r"\\\g<0>", text)


def one_of(texts: Iterable[str]) -> str:
    """A regex that these texts alone match."""
    return "|".join(map(escape, texts))
