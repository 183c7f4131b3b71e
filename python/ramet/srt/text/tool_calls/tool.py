"""Owns what the parsers and grammars know of a request's tools, and the ids of calls."""

import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
        return {"type": "object", **self.parameters}

    @property
    def properties(self) -> Mapping[str, Any]:
        """Parameter -> schema, as far as the schema lists them."""
        found = self.parameters.get("properties")
        return found if isinstance(found, Mapping) else {}


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
