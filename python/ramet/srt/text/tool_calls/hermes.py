"""Owns the calls of Hermes and Qwen: <tool_call>{"name": …, "arguments": {…}}</tool_call>, one block for each."""

import json

from ramet.srt.text.text_machine import Waiting
from ramet.srt.text.tool_calls.format import ToolCallFormat
from ramet.srt.text.tool_calls.json_call import JsonCallParser
from ramet.srt.text.tool_calls.lark import Lark, literal
from ramet.srt.text.tool_calls.tool import Tool

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser(JsonCallParser):
    """Reads one block after the other."""

    begin_marks = (BEGIN,)

    def _read_calls(self) -> Waiting:
        yield from self._read_call_object()
        yield from self._skip_mark(END)


class HermesFormat(ToolCallFormat):
    """Qwen 2.5 and 3, QwQ, Hermes 2 Pro and 3, Granite 4."""

    parser = HermesParser
    marks = (BEGIN, END)
    trigger = BEGIN
    between = "\n"

    def call(self, lark: Lark, tool: Tool) -> str:
        return f'"\\n" {json_call(lark, tool, "arguments")} "\\n" {lark.mark(END)}'


def json_call(lark: Lark, tool: Tool, key: str) -> str:
    """The expression of {"name": …, key: {…}}."""
    head = f'{{"name": {json.dumps(tool.name)}, "{key}": '
    return f"{literal(head)} {lark.json(tool.schema)} {literal('}')}"
