"""Owns what a client's JSON schema becomes before the grammar library gets it, which refuses what it can't enforce.

Tools write more into their schemas than constrains an answer, and some of it in a form that the library doesn't know
though it could enforce it. Three things are done, at each place where a schema stands:

- rewritten: what has the same meaning in words that the library knows;
- left out: `uniqueItems`, `format`s that it does not know (JSON Schema calls them annotations), and `discriminator`,
  which tells apart what `anyOf` lists: an answer may break these;
- all else is left to the library, which says what it can't do.
"""

import json
from collections.abc import Iterator
from typing import Any

from ramet.srt.text import regex

# Those that llguidance enforces.
KNOWN_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"}
)
# pydantic's for a decimal number as a text, with a look-ahead, and the same without.
DECIMAL, PLAIN_DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", r"^[+-]?(\d+\.?\d*|\.\d+)$"

# Keywords whose value is a schema, a list of schemas, or an object of schemas by names of the client's.
ONE = ("items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames",
       "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
LISTS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def adapt_schema(text: str) -> str:
    """The schema as the library is to get it; itself where it is no JSON, which the library will say.

    Raises:
        RecursionError: if it is nested too deeply to be read.
    """
    try:
        schema = json.loads(text)
    except ValueError:
        return text
    if schema is True:
        return "{}"
    left = [schema]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            _adapt(one)
            left.extend(_parts(one))
    return json.dumps(schema)


def _parts(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas right below one."""
    for name in ONE:
        yield schema.get(name)
    for name in LISTS:
        if isinstance(schema.get(name), list):
            yield from schema[name]
    for name in NAMED:
        if isinstance(schema.get(name), dict):
            yield from schema[name].values()


def _adapt(schema: dict[str, Any]) -> None:
    schema.pop("uniqueItems", None)
    if isinstance(schema.get("format"), str) and schema["format"] not in KNOWN_FORMATS:
        del schema["format"]
    if schema.get("pattern") == DECIMAL:
        schema["pattern"] = PLAIN_DECIMAL
    if schema.pop("discriminator", None) is not None and "anyOf" not in schema and "oneOf" in schema:
        schema["anyOf"] = schema.pop("oneOf")
    names = schema.get("propertyNames")
    if isinstance(names, dict) and not {"properties", "patternProperties"} & schema.keys():
        _name_properties(schema, names)


def _name_properties(schema: dict[str, Any], names: dict[str, Any]) -> None:
    """Say by the properties themselves how they may be called: a mapping with keys of an enum, or of a pattern."""
    values = schema.get("additionalProperties", True)
    rest = names.keys() - {"type", "title", "description"}
    keys = [names["const"]] if rest == {"const"} else names.get("enum")
    pattern = None
    if rest in ({"const"}, {"enum"}) and isinstance(keys, list) and all(isinstance(key, str) for key in keys):
        pattern = f"^({regex.one_of(keys)})$"
    elif rest == {"pattern"}:
        pattern = names["pattern"]
    if isinstance(pattern, str):
        schema["patternProperties"] = {pattern: values}
        schema["additionalProperties"] = False
    elif rest:
        return
    del schema["propertyNames"]
