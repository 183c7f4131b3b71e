"""Owns the writing of a grammar in llguidance's dialect of Lark: marks as texts or special tokens, schemas, free text.

Source of the dialect: docs/syntax.md of llguidance.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from ramet.srt.text import regex
from ramet.srt.text.json_schema import adapt_schema

# Between the parts of a JSON text. Bounded, so that a model that likes white space still reaches the end.
JSON_WHITESPACE = r"[ \n\t]{0,20}"

MAX_SCHEMA_CHARS = 1 << 20  # of one grammar, whose schemas may share definitions that each of them has to repeat

TokenId = Callable[[str], int | None]


class Lark:
    """A grammar under construction.

    Args:
        special_id: the id of the special token with a text; None where the text is written with ordinary tokens.
    """

    def __init__(self, special_id: TokenId):
        self._special_id = special_id
        self._rules: dict[str, str] = {}
        self._num_schema_chars = 0

    def __str__(self) -> str:
        return "\n".join(["%llguidance {}", *(f"{name}: {body}" for name, body in self._rules.items())])

    def rule(self, name: str, body: str, *, is_lazy: bool = False) -> str:
        """Add a rule, or a terminal if the name is in capitals. Returns the name."""
        self._rules[f"{name}[lazy]" if is_lazy else name] = body
        return name

    def fresh(self, name: str) -> str:
        """A name that no rule has, for several of a kind."""
        return f"{name}_{len(self._rules)}"

    def is_special(self, mark: str) -> bool:
        """Whether the mark is a special token, which no text can spell."""
        return self._special_id(mark) is not None

    def mark(self, mark: str) -> str:
        """The expression of a mark."""
        token_id = self._special_id(mark)
        return literal(mark) if token_id is None else f"<[{token_id}]>"

    def json(self, schema: Mapping[str, Any]) -> str:
        """The expression of a JSON value that fits a schema, as far as one can be held to it (text/json_schema.py).

        Raises:
            ValueError: if that is too much of schemas.
        """
        text = json.dumps(with_whitespace(schema))
        self._num_schema_chars += len(text)
        if self._num_schema_chars > MAX_SCHEMA_CHARS:
            raise ValueError(f"the schemas have more than {MAX_SCHEMA_CHARS} characters, with what they refer to")
        return f"%json {adapt_schema(text)}"

    def through(self, mark: str, name: str) -> str:
        """The expression of any text up to the first such mark, and the mark."""
        if self.is_special(mark):
            return f"{self.text()} {self.mark(mark)}"
        return self.rule(self.fresh(name), f"/(.|\\n)*{regex.escape(mark)}/", is_lazy=True)

    def text(self) -> str:
        """The expression of any text, which has no special tokens."""
        return self.rule("TEXT", r"/(.|\n)*/")

    def text_without(self, mark: str) -> str:
        """The expression of any text that has no such mark."""
        if self.is_special(mark):
            return self.text()
        escaped = regex.escape(mark)
        return self.rule(self.fresh("TEXT_WITHOUT"), f"/(?s:.*)/ & ~/(?s:.*){escaped}(?s:.*)/")

    def line_break(self) -> str:
        """The expression of a line break, or none: models of a family differ in it, and none of them matters."""
        return self.rule("BREAK", r"/\n?/")

    def space(self) -> str:
        """The expression of a little white space, or none."""
        return self.rule("SPACE", r"/[ \n\t]{0,8}/")


def literal(text: str) -> str:
    """The expression of a text."""
    return json.dumps(text) if text else '""'


def with_whitespace(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema that bounds the white space in its JSON texts."""
    return {**schema, "x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
