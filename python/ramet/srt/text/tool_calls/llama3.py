"""Owns the calls of Llama 3: {"name": …, "parameters": {…}}, which may stand behind <|python_tag|>, with ; between.

Without the mark a call is one only at the beginning of the output, or behind another.
"""

import json
from collections.abc import Generator, Mapping
from typing import Any

from ramet.srt.text.text_machine import Waiting
from ramet.srt.text.tool_calls.format import ToolCallFormat
from ramet.srt.text.tool_calls.json_call import ARGUMENT_KEYS, JsonCallParser
from ramet.srt.text.tool_calls.lark import Lark
from ramet.srt.text.tool_calls.tool import Tool

PYTHON_TAG = "<|python_tag|>"
KEY = "parameters"


class Llama3Parser(JsonCallParser):
    """Reads objects as long as one follows the other."""

    begin_marks = (PYTHON_TAG,)
    knows_keys_only = ("name", "type", "id", *ARGUMENT_KEYS)

    def _comes_plain(self) -> Generator[None, None, bool]:
        return (yield from self._comes("{")) is not None

    def _read_calls(self) -> Waiting:
        while True:
            yield from self._read_call_object()
            if (yield from self._skip_mark(";", ",")) is None:
                return


class Llama3Format(ToolCallFormat):
    """Llama 3.1 to 3.3."""

    parser = Llama3Parser
    marks = (PYTHON_TAG,)
    trigger = None
    is_sectioned = True
    between = "; "

    def call(self, lark: Lark, tool: Tool) -> str:
        """All of it as one JSON text: beside another one, which an answer may be, pieces of text begin no call."""
        properties = {"name": {"const": tool.name}, KEY: moved(tool.schema, f"#/properties/{KEY}")}
        return lark.json(
            {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        )

    def section(self, lark: Lark, calls: str) -> str:
        return f"({lark.mark(PYTHON_TAG)})? {calls}"


def moved(schema: Mapping[str, Any], place: str) -> Any:
    """A schema as it must be to stand in another one at `place`, a JSON pointer, where its references begin then."""

    def move(node: dict[str, Any]) -> dict[str, Any]:
        reference = node.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            node["$ref"] = place + reference.removeprefix("#")
        return node

    return json.loads(json.dumps(schema), object_hook=move)
