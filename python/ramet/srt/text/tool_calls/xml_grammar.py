"""Owns the grammar of parameters that are written as plain text between tags: values that fit their schemas.

Parameters come in the schema's order, those that aren't required may be left out, and others don't come. What can't be
said of such a text in a grammar is an error, not a guess.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ramet.srt.text import regex
from ramet.srt.text.tool_calls.lark import Lark, literal
from ramet.srt.text.tool_calls.tool import Tool
from ramet.srt.text.tool_calls.xml_values import MAX_SCHEMAS, resolve, value_kinds

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "format",
     "$comment", "$schema", "$id", "$defs", "definitions", "strict"}
)  # fmt: skip
OBJECT_KEYS = ANNOTATIONS | {"type", "properties", "required", "additionalProperties"}
STRING_KEYS = ANNOTATIONS | {"type", "enum", "const", "minLength", "maxLength", "pattern"}
MAX_DEPTH = 16
FOREIGN_REFERENCE = re.compile(r'"\$ref": (?!"#/(\$defs|definitions)/)')
ESCAPES_AND_CLASSES = re.compile(r"\\.|\[(?:\\.?|[^\]\\])*(?:\]|\Z)", re.DOTALL)


class ValueTags(NamedTuple):
    """What stands behind a parameter's value."""

    close: str  # the mark that ends it
    before_close: str  # white space that is no part of the value
    behind: str  # the expression of what stands behind that


def parameter_rules(lark: Lark, tool: Tool, head: Callable[[str], str], tags: ValueTags) -> str:
    """The expression of all parameters of a call.

    Args:
        head: the expression of what stands before the value of the parameter with a name.

    Raises:
        ValueError: if the schema asks for what can't be held; it names the tool and the parameter.
    """
    check_object_keys(tool)
    members = []
    for name, schema in all_parameters(tool).items():
        value = ValueWriter(lark, tool, name, tags).write(schema)
        member = f"{head(name)} {value} {tags.behind}"
        members.append(member if name in required_names(tool) else f"({member})?")
    return " ".join(members)


def check_object_keys(tool: Tool) -> None:
    """Raises ValueError if the schema asks more of the parameters together than which of them there must be."""
    unknown = sorted(set(tool.parameters) - OBJECT_KEYS)
    if unknown:
        raise ValueError(f"tool {tool.name!r}: parameters can't be guaranteed to fit {unknown[0]!r} of their schema")


def required_names(tool: Tool) -> list[str]:
    """The parameters that must be there."""
    names = tool.parameters.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def all_parameters(tool: Tool) -> dict[str, Any]:
    """Parameter -> schema: those that the schema lists, and those that it only requires."""
    return {**tool.properties, **{name: {} for name in required_names(tool) if name not in tool.properties}}


def by_itself(tool: Tool, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's schema with the definitions that it may refer to.

    Raises:
        ValueError: if it refers to something else, which would be another thing now; it names the tool.
    """
    if '"$ref"' not in json.dumps(schema):
        return {**schema}
    whole = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters} | {**schema}
    if FOREIGN_REFERENCE.search(json.dumps(whole)):
        raise ValueError(f"tool {tool.name!r}: a $ref can only be kept to if it begins with '#/$defs/'")
    return whole


class ValueWriter:
    """Writes the expression of one parameter's value, with the mark that ends it."""

    def __init__(self, lark: Lark, tool: Tool, name: str, tags: ValueTags):
        self._lark = lark
        self._tool = tool
        self._root = tool.parameters
        self._num_schemas = 0
        self._where = f"tool {tool.name!r}, parameter {name!r}"
        self._tags = tags
        self._end = f"{literal(tags.before_close)} {lark.mark(tags.close)}"

    def write(self, schema: Any, depth: int = 0) -> str:
        """Raises ValueError if the schema asks for what can't be held."""
        self._num_schemas += 1
        if not isinstance(schema, Mapping) or depth > MAX_DEPTH or self._num_schemas > MAX_SCHEMAS:
            raise ValueError(f"{self._where}: its schema can't be guaranteed")
        keys = set(schema) - ANNOTATIONS
        if keys == {"$ref"}:
            return self.write(resolve(schema["$ref"], self._root), depth + 1)
        for union in ("anyOf", "oneOf"):
            if keys == {union} and isinstance(schema[union], list) and schema[union]:
                return "(" + " | ".join(self.write(branch, depth + 1) for branch in schema[union]) + ")"
        if isinstance(types := schema.get("type"), list) and types:
            return "(" + " | ".join(self.write({**schema, "type": one}, depth + 1) for one in types) + ")"
        kinds = value_kinds(schema, self._root)
        if "string" not in kinds:
            return f"{self._lark.json(by_itself(self._tool, schema))} {self._end}"
        if keys - STRING_KEYS or (kinds != {"string"} and keys):
            wrong = sorted(keys - STRING_KEYS or keys)[0]
            raise ValueError(f"{self._where}: its value can't be guaranteed to fit {wrong!r} of its schema")
        return self._string(schema) if keys - {"type"} else self._lark.through(self._tags.close, "value")

    def _string(self, schema: Mapping[str, Any]) -> str:
        """A string with bounds."""
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if values is not None:
            values = values if isinstance(values, list) else []
            texts = [value for value in values if isinstance(value, str) and self._tags.close not in value]
            if not texts or {"minLength", "maxLength", "pattern"} & set(schema):
                raise ValueError(f"{self._where}: its value can't be guaranteed to fit 'enum' of its schema")
            return "(" + " | ".join(map(literal, texts)) + f") {self._end}"
        lark = self._lark
        low, high, pattern = schema.get("minLength", 0), schema.get("maxLength", ""), schema.get("pattern", "")
        for key, value, kind in (("minLength", low, int), ("maxLength", high or 0, int), ("pattern", pattern, str)):
            if type(value) is not kind:
                raise ValueError(f"{self._where}: {key!r} of its schema can't be {value!r:.60}")
        parts = [f"/(?s:.){{{low},{high}}}/", f"/{self._whole_pattern(pattern)}/"]
        if lark.is_special(self._tags.close):
            return f"{lark.rule(lark.fresh('VALUE'), ' & '.join(parts))} {self._end}"
        # One terminal with its end: the end of a text that may have the end's first letters in it has to be in it.
        parts.append(f"~/(?s:.*){regex.escape(self._tags.close)}(?s:.*)/")
        value = lark.rule(lark.fresh("VALUE"), " & ".join(parts))
        return lark.rule(lark.fresh("ENDED"), f"{value} {literal(self._tags.before_close + self._tags.close)}")

    def _whole_pattern(self, pattern: str) -> str:
        """A regex that must be found in a text, as one that the whole text must match."""
        bare = ESCAPES_AND_CLASSES.sub("", pattern)
        if "|" in re.sub(r"\([^()]*\)", "", bare) or re.search(r"(?<!^)\^|\$(?!$)", bare):
            raise ValueError(f"{self._where}: its value can't be guaranteed to fit 'pattern' of its schema")
        begins, ends = pattern.startswith("^"), bare.endswith("$")
        inner = pattern[int(begins) : len(pattern) - int(ends)]
        whole = f"{'' if begins else '(?s:.*)'}(?:{inner}){'' if ends else '(?s:.*)'}"
        return re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", whole)
