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
MAX_SCHEMAS = 256  # that are looked at for one parameter: references may lead to the same one again and again


def parameter_kinds(tool: Tool, name: str) -> frozenset[str]:
    """The JSON types that a parameter's value may have; all where the schema does not say."""
    schema = tool.properties.get(name)
    return ALL_KINDS if schema is None else value_kinds(schema, tool.parameters)


def value_kinds(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that fit a schema; all, where it is too large to say.

    Args:
        root: the schema in which its references are.
    """
    return _KindReader(root).read(schema)


class _KindReader:
    """Reads one schema, and what it refers to."""

    def __init__(self, root: Mapping[str, Any]):
        self._root = root
        self._num_schemas = 0

    def read(self, schema: Any, depth: int = 0) -> frozenset[str]:
        self._num_schemas += 1
        if not isinstance(schema, Mapping) or depth > MAX_DEPTH or self._num_schemas > MAX_SCHEMAS:
            return ALL_KINDS
        kinds = ALL_KINDS
        if (reference := schema.get("$ref")) is not None:
            kinds &= self.read(resolve(reference, self._root), depth + 1)
        if (declared := schema.get("type")) is not None:
            kinds &= frozenset(kind for kind in _list(declared) or [declared] if isinstance(kind, str))
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            kinds &= frozenset(kind for value in values for kind in kinds_of(value))
        for key in ("anyOf", "oneOf"):
            if branches := _list(schema.get(key)):
                kinds &= frozenset().union(*(self.read(branch, depth + 1) for branch in branches))
        for branch in _list(schema.get("allOf")):
            kinds &= self.read(branch, depth + 1)
        return kinds


def _list(value: Any) -> list[Any]:
    """The value, where it is a list, as the schema of schemas wants it; else an empty one."""
    return value if isinstance(value, list) else []


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
