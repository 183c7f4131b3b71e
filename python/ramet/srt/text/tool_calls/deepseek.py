"""Owns the calls of DeepSeek V3 and V3.1: a section of calls between marks of their own.

V3 and R1 write the arguments in a block of Markdown behind the kind and the name, V3.1 right behind the name.
"""

from ramet.srt.text.text_machine import Malformed, Marks, Waiting
from ramet.srt.text.tool_calls.format import ToolCallFormat
from ramet.srt.text.tool_calls.lark import Lark, literal
from ramet.srt.text.tool_calls.parser import ToolCallParser
from ramet.srt.text.tool_calls.tool import Tool

SECTION_BEGIN, SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE, FENCE_END = "```json", "```"
MAX_KIND_LEN = 32
SEPARATORS = Marks((SEPARATOR,))


class DeepSeekV31Parser(ToolCallParser):
    """Reads the calls of a section: name, separator, arguments."""

    begin_marks = (SECTION_BEGIN,)

    def _read_calls(self) -> Waiting:
        yield from self._read_section(BEGIN, END, SECTION_END)

    def _read_call(self) -> Waiting:
        name = yield from self._read_name()
        if (yield from self._skip_mark(SEPARATOR)) is None:
            raise Malformed
        yield from self._read_arguments(name)


class DeepSeekV3Parser(DeepSeekV31Parser):
    """Reads the calls of a section: "function", separator, name, fence, arguments, fence."""

    def _read_call(self) -> Waiting:
        yield from self._collect(SEPARATORS, MAX_KIND_LEN)
        name = yield from self._read_name()
        yield from self._skip_mark(FENCE)
        yield from self._read_arguments(name)
        yield from self._skip_mark(FENCE_END)


class DeepSeekV31Format(ToolCallFormat):
    """DeepSeek V3.1."""

    parser = DeepSeekV31Parser
    marks = (SECTION_BEGIN, SECTION_END, BEGIN, SEPARATOR, END)
    trigger = SECTION_BEGIN
    is_sectioned = True
    between = ""

    def call(self, lark: Lark, tool: Tool) -> str:
        return f"{lark.mark(BEGIN)} {self._body(lark, tool)} {lark.mark(END)}"

    def section(self, lark: Lark, calls: str) -> str:
        return f"{calls} {lark.mark(SECTION_END)}"

    def _body(self, lark: Lark, tool: Tool) -> str:
        return f"{literal(tool.name)} {lark.mark(SEPARATOR)} {lark.json(tool.schema)}"


class DeepSeekV3Format(DeepSeekV31Format):
    """DeepSeek V3 and R1."""

    parser = DeepSeekV3Parser
    between = "\n"

    def _body(self, lark: Lark, tool: Tool) -> str:
        name, end = literal(f"{tool.name}\n{FENCE}\n"), literal(f"\n{FENCE_END}")
        return f'"function" {lark.mark(SEPARATOR)} {name} {lark.json(tool.schema)} {end}'
