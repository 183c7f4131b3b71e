"""Owns what the parsers and grammars know of a request's tools, and the ids of calls."""

import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# With these a schema says itself which members there may be beside `properties`.
OPEN_WORDS = {"additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref"}
ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)  # JSON schema of its arguments; {}: anything
    strict: bool = False  # the arguments must fit the schema although the model is free to call or not

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of its arguments, which are an object in any case."""
        if not self.parameters:
            return {"type": "object"}
        return {"type": "object", **closed(self.parameters)}

    @property
    def properties(self) -> Mapping[str, Any]:
        """Parameter -> schema, as far as the schema lists them."""
        found = self.parameters.get("properties")
        return found if isinstance(found, Mapping) else {}


def closed(schema: Any) -> Any:
    """A schema whose objects have no other members than those that it lists, where it does not say otherwise.

    One that puts objects together of several schemas (allOf) stays as it is: each lists only its own members.
    """
    return schema if "allOf" in _words(schema) else _closed(schema)


def _words(schema: Any) -> set[str]:
    """All names of members."""
    if isinstance(schema, list):
        return set().union(*map(_words, schema))
    return set(schema).union(*map(_words, schema.values())) if isinstance(schema, Mapping) else set()


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for name in ("properties", "$defs", "definitions"):
        if isinstance(found.get(name), Mapping):
            found[name] = {key: _closed(one) for key, one in found[name].items()}
    for name in ("items", "prefixItems", "additionalProperties"):
        if name in found:
            found[name] = _closed(found[name])
    if "properties" not in found:
        return found | {name: _closed(found[name]) for name in ("anyOf", "oneOf") if name in found}
    if not found.keys() & OPEN_WORDS:
        found["additionalProperties"] = False
    return found


def by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    """Name -> tool."""
    return {tool.name: tool for tool in tools}


def new_call_id() -> str:
    """An id in OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


def new_short_call_id() -> str:
    """An id in Mistral's form: nine letters and digits, which its templates insist on."""
    return "".join(secrets.choice(ALPHANUMERIC) for _ in range(9))


NewId = Callable[[], str]
