"""Owns the ways in which a body says what form its output has, OpenAI's, SGLang's and vLLM's, and which it has used."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ramet.srt.entrypoints.openai.protocol import CompletionRequest, JsonSchemaFormat, ResponseFormat, SamplingBody
from ramet.srt.errors import RequestError
from ramet.srt.text import regex

ANY_OBJECT = {"type": "object"}


class BodyConstraint(NamedTuple):
    """What the output must keep to."""

    name: str  # the field of the body
    kind: str  # the sampling parameter that says the same
    value: Any  # its value: a text, or a JSON schema as an object


def constraint_of_body(body: SamplingBody) -> BodyConstraint | None:
    """The constraint that the body names; None if its output is free.

    Raises:
        RequestError: if it names several.
    """
    given = [constraint for constraint in _constraints(body) if constraint.value not in (None, "")]
    if len(given) > 1:
        first, second = given[0].name, given[1].name
        names = first if first == second else f"{first} and {second} together"
        raise RequestError(f"the output can have only one form, and {names} would give it several", param=second)
    return given[0] if given else None


def _constraints(body: SamplingBody) -> Iterator[BodyConstraint]:
    yield BodyConstraint("response_format", "json_schema", _schema(body.response_format))
    if isinstance(body, CompletionRequest):
        yield BodyConstraint("json_schema", "json_schema", body.json_schema)
    yield BodyConstraint("regex", "regex", body.regex)
    yield BodyConstraint("ebnf", "ebnf", body.ebnf)
    yield BodyConstraint("guided_json", "json_schema", body.guided_json)
    yield BodyConstraint("guided_regex", "regex", body.guided_regex)
    yield BodyConstraint("guided_choice", "regex", _one_of(body.guided_choice))
    yield BodyConstraint("guided_grammar", "ebnf", body.guided_grammar)
    if (wanted := body.structured_outputs) is not None:
        name = "structured_outputs"
        yield BodyConstraint(name, "json_schema", wanted.schema_)
        yield BodyConstraint(name, "json_schema", ANY_OBJECT if wanted.json_object else None)
        yield BodyConstraint(name, "regex", wanted.regex)
        yield BodyConstraint(name, "regex", _one_of(wanted.choice))
        yield BodyConstraint(name, "ebnf", wanted.grammar)


def _schema(wanted: ResponseFormat | None) -> Any:
    if wanted is None or wanted.type == "text":
        return None
    return wanted.json_schema.json_schema if isinstance(wanted, JsonSchemaFormat) else ANY_OBJECT


def _one_of(choices: list[str] | None) -> str | None:
    return regex.one_of(choices) if choices else None
