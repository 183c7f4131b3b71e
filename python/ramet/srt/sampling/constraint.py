"""Owns what a request says about the form of its output: which parameter, its text, and how long that may be."""

from typing import NamedTuple

from ramet.srt.errors import RequestError
from ramet.srt.sampling.sampling_params import GRAMMAR_FIELDS, SamplingParams

MAX_CONSTRAINT_BYTES = 512 * 1024
MAX_REGEX_BYTES = 64 * 1024  # a regex is one lexeme, so that its cost grows faster than that of rules


class Constraint(NamedTuple):
    """A regex, a JSON schema or a grammar, as the request has it."""

    name: str  # the sampling parameter
    text: str
    before: str = ""  # a grammar, in Lark, of the whole output, in which @answer is the rest of this


def constraint_of(params: SamplingParams, before: str = "") -> Constraint | None:
    """The request's constraint, with what may come before; None when its output is free.

    Raises:
        RequestError: if it is longer than any may be; it names the parameter.
    """
    for name in GRAMMAR_FIELDS:
        text = getattr(params, name)
        if text is not None:
            limit = MAX_REGEX_BYTES if name == "regex" else MAX_CONSTRAINT_BYTES
            num_bytes, num_before = _num_bytes(text), _num_bytes(before)
            if num_bytes > limit:
                raise RequestError(f"{name} has {num_bytes} bytes; at most {limit} can be used", param=name)
            if num_bytes + num_before > MAX_CONSTRAINT_BYTES:
                raise RequestError(
                    f"{name} has {num_bytes} bytes, and the tools that may be called in its place make {num_before} "
                    f"more; at most {MAX_CONSTRAINT_BYTES} can be used together",
                    param=name,
                )
            return Constraint(name, text, before)
    return None


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
