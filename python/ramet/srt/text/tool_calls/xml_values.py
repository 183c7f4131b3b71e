"""Owns the values of parameters that are written as plain text between tags: which JSON value a text stands for.

A text stands for itself where the schema wants a string, and else for the JSON value or Python literal that it spells.
"""

import ast
import json
from collections.abc import Mapping
from typing import Any

from ramet.srt.text.text_machine import Malformed
from ramet.srt.text.tool_calls.json_call import load_json, write_json
from ramet.srt.text.tool_calls.tool import Tool

ALL_KINDS = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
STRING_ONLY = frozenset({"string"})
MAX_DEPTH = 16


def parameter_kinds(tool: Tool, name: str) -> frozenset[str]:
    """The JSON types that a parameter's value may have; all where the schema does not say."""
    schema = tool.properties.get(name)
    return ALL_KINDS if schema is None else value_kinds(schema, tool.parameters)


def value_kinds(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """The JSON types that fit a schema.

    Args:
        root: the schema in which its references are.
    """
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return ALL_KINDS
    kinds = ALL_KINDS
    if (reference := schema.get("$ref")) is not None:
        kinds &= value_kinds(resolve(reference, root), root, depth + 1)
    if (declared := schema.get("type")) is not None:
        kinds &= frozenset(declared if isinstance(declared, list) else [declared])
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        kinds &= frozenset(kind for value in values for kind in kinds_of(value))
    for key in ("anyOf", "oneOf"):
        if isinstance(branches := schema.get(key), list):
            kinds &= frozenset().union(*(value_kinds(branch, root, depth + 1) for branch in branches))
    for branch in schema.get("allOf") or ():
        kinds &= value_kinds(branch, root, depth + 1)
    return kinds


def resolve(reference: Any, root: Mapping[str, Any]) -> Any:
    """What a reference of the form #/a/b means; {} where there is no such thing."""
    found: Any = root
    for part in str(reference).removeprefix("#").split("/")[1:]:
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return {} if found is None else found


def kinds_of(value: Any) -> frozenset[str]:
    """The JSON types of a value: an integer is a number, too."""
    if value is None:
        return frozenset({"null"})
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return frozenset({"integer", "number"})
    names = {float: "number", str: "string", list: "array", tuple: "array", dict: "object"}
    return frozenset({names[type(value)]}) if type(value) in names else frozenset()


def write_value(text: str, kinds: frozenset[str]) -> str:
    """The JSON text of the value that `text` stands for; a string where it spells no value of these types."""
    if kinds - STRING_ONLY:
        for read in (read_json, read_literal):
            try:
                value, written = read(text.strip())
            except Malformed:
                continue
            if kinds_of(value) & (kinds - STRING_ONLY):
                return written
    return write_json(text)


def read_json(text: str) -> tuple[Any, str]:
    """The value of a JSON text, and its JSON text. Raises Malformed if it is none."""
    value = load_json(text)
    return value, write_json(value)


def read_literal(text: str) -> tuple[Any, str]:
    """The value of a Python literal, where true, false and null may stand for Python's words; and its JSON text.

    Raises:
        Malformed: if it is none, or JSON has no such value.
    """
    try:
        return read_json_text_with_line_breaks(text)
    except ValueError:
        pass
    try:
        value = ast.literal_eval(JsonWords().visit(ast.parse(text, mode="eval")))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise Malformed from None
    return value, write_json(value)


def read_json_text_with_line_breaks(text: str) -> tuple[Any, str]:
    """As `read_json`, for strings with line breaks in them. Raises ValueError if it is no JSON otherwise."""
    try:
        value = json.loads(text, strict=False)
    except RecursionError:
        raise Malformed from None
    return value, write_json(value)


class JsonWords(ast.NodeTransformer):
    """Takes true, false and null for what they mean in JSON."""

    WORDS = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:  # noqa: N802 - ast's name
        if node.id not in self.WORDS:
            return node
        return ast.copy_location(ast.Constant(self.WORDS[node.id]), node)
