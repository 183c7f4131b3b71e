"""Owns the calls of Qwen3-Coder: <tool_call><function=name><parameter=name>value</parameter></function></tool_call>."""

from ramet.srt.text.text_machine import Malformed, Marks, Waiting
from ramet.srt.text.tool_calls.format import ToolCallFormat
from ramet.srt.text.tool_calls.lark import Lark, literal
from ramet.srt.text.tool_calls.tool import Tool
from ramet.srt.text.tool_calls.xml_call import XmlCallParser
from ramet.srt.text.tool_calls.xml_grammar import ValueTags, parameter_rules

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
NAME_ENDS = Marks((">",))
VALUE_ENDS = Marks(("\n" + PARAMETER_END, PARAMETER_END))
TAGS = ValueTags(PARAMETER_END, "\n", literal("\n"))
MAX_NAME_LEN = 256


class Qwen3CoderParser(XmlCallParser):
    """Reads one function after the other, with <tool_call> around it or without."""

    begin_marks = (BEGIN, FUNCTION)

    def _read_calls(self) -> Waiting:
        if self._mark == BEGIN:
            yield from self._skip_space()
            yield from self._expect(FUNCTION)
        name = yield from self._read_name()
        yield from self._expect(">")
        has_begun = False
        while (found := (yield from self._skip_mark(PARAMETER, FUNCTION_END, END))) == PARAMETER:
            parameter, _ = yield from self._collect(NAME_ENDS, MAX_NAME_LEN)
            if not has_begun:
                self._begin_call(name)
                has_begun = True
            yield from self._take("\n")
            yield from self._read_value(parameter.strip(), VALUE_ENDS)
        if found is None:
            raise Malformed
        if not has_begun:
            self._begin_call(name)
        self._end_call()
        if found == FUNCTION_END:
            yield from self._skip_mark(END)


class Qwen3CoderFormat(ToolCallFormat):
    """Qwen3-Coder, Qwen3.5, Nemotron 3, Step 3.5."""

    parser = Qwen3CoderParser
    marks = (BEGIN, END)
    trigger = BEGIN
    between = "\n"

    def call(self, lark: Lark, tool: Tool) -> str:
        head = literal(f"\n{FUNCTION}{tool.name}>\n")
        parameters = parameter_rules(lark, tool, lambda name: literal(f"{PARAMETER}{name}>\n"), TAGS)
        return f'{head} {parameters} {literal(FUNCTION_END)} "\\n" {lark.mark(END)}'
