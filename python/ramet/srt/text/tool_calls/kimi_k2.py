"""Owns the calls of Kimi K2: a section of calls whose ids, functions.name:number, hold their names."""

import re

from ramet.srt.text.text_machine import Malformed, Marks, Waiting
from ramet.srt.text.tool_calls.format import ToolCallFormat
from ramet.srt.text.tool_calls.lark import Lark, literal
from ramet.srt.text.tool_calls.parser import ToolCallParser
from ramet.srt.text.tool_calls.tool import Tool

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
BEGIN, ARGUMENTS, END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
ID_ENDS = Marks((ARGUMENTS,))
PREFIX, MAX_NUMBER_LEN = "functions.", 16


class KimiK2Parser(ToolCallParser):
    """Reads the calls of a section. Their ids are kept: the model refers to them."""

    begin_marks = (SECTION_BEGIN,)

    def _read_calls(self) -> Waiting:
        yield from self._read_section(BEGIN, END, SECTION_END)

    def _read_call(self) -> Waiting:
        yield from self._skip_space()
        prefix = (yield from self._take(PREFIX)) or ""
        name = yield from self._read_name()
        number, _ = yield from self._collect(ID_ENDS, MAX_NUMBER_LEN)
        if re.fullmatch(r"\s*(:[0-9]+)?\s*", number) is None:
            raise Malformed
        yield from self._read_arguments(name, prefix + name + number.strip())


class KimiK2Format(ToolCallFormat):
    """Kimi K2, K2 Thinking."""

    parser = KimiK2Parser
    marks = (SECTION_BEGIN, SECTION_END, BEGIN, ARGUMENTS, END)
    trigger = SECTION_BEGIN
    is_sectioned = True
    between = ""

    def call(self, lark: Lark, tool: Tool) -> str:
        head = f"{lark.mark(BEGIN)} {literal(f'{PREFIX}{tool.name}:')} {lark.rule('NUMBER', '/[0-9]{1,4}/')}"
        return f"{head} {lark.mark(ARGUMENTS)} {lark.json(tool.schema)} {lark.mark(END)}"

    def section(self, lark: Lark, calls: str) -> str:
        return f"{calls} {lark.mark(SECTION_END)}"
