"""Owns what the log says of a request without what its user wrote: names, yes; texts, values and secrets, no."""

import re

MAX_TARGET_CHARS = 512
MAX_METHOD_CHARS = 32
MAX_ERROR_CHARS = 400
LEFT_OUT = "…"
NAME = re.compile(r"[\w./:@+-]{1,128}")  # of a model, a tool, a field
PARAMETER = re.compile(r"[\w.-]{1,64}", re.ASCII)
# A string as Python writes it, or the beginning of one. An apostrophe within a word begins none. What stands behind
# "not" is the value that was given in place of another.
QUOTED = re.compile(
    r"""(?P<given>\b(?:not|be|got)[ ])?(?<!\w)(?P<quote>['"])(?P<text>(?:\\.|(?!(?P=quote)).)*)(?:(?P=quote)|\Z)""",
    re.DOTALL,
)


def logged_target(path: str, query: str) -> str:
    """A path with the names in its query; values may be keys."""
    names = (part.partition("=") for part in query.split("&")) if query else ()
    shown = [f"{name}={LEFT_OUT}" if equals and PARAMETER.fullmatch(name) else LEFT_OUT for name, equals, _ in names]
    return cut(path + ("?" + "&".join(shown) if shown else ""), MAX_TARGET_CHARS)


def without_texts(error: str) -> str:
    """What is wrong with a request, but for values and texts that it quotes."""
    return cut(QUOTED.sub(_without_text, error), MAX_ERROR_CHARS)


def without_query(url: str) -> str:
    """An address without what stands behind its path."""
    return cut(re.split("[?#]", url, maxsplit=1)[0], MAX_TARGET_CHARS)


def cut(text: str, max_chars: int) -> str:
    """A text, or its beginning and how long it is."""
    return text if len(text) <= max_chars else f"{text[:max_chars]}{LEFT_OUT} ({len(text) - max_chars} more characters)"


def _without_text(match: re.Match[str]) -> str:
    given, quote = match["given"] or "", match["quote"]
    is_name = not given and NAME.fullmatch(match["text"])
    return match[0] if is_name else f"{given}{quote}{LEFT_OUT}{quote}"
