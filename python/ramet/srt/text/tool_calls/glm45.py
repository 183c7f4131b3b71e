"""Owns the calls of GLM-4.5 to 4.7: <tool_call>name<arg_key>name</arg_key><arg_value>value</arg_value></tool_call>."""

from ramet.srt.text.text_machine import Malformed, Marks, Waiting
from ramet.srt.text.tool_calls.format import ToolCallFormat
from ramet.srt.text.tool_calls.lark import Lark, literal
from ramet.srt.text.tool_calls.tool import Tool
from ramet.srt.text.tool_calls.xml_call import XmlCallParser
from ramet.srt.text.tool_calls.xml_grammar import ValueTags, parameter_rules

BEGIN, END = "<tool_call>", "</tool_call>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
KEY_ENDS, VALUE_ENDS = Marks((KEY_END,)), Marks((VALUE_END,))
MAX_NAME_LEN = 256


class Glm45Parser(XmlCallParser):
    """Reads one block after the other, with line breaks between the tags (4.5, 4.6) or without (4.7)."""

    begin_marks = (BEGIN,)

    def _read_calls(self) -> Waiting:
        name = yield from self._read_name()
        found = yield from self._skip_mark(KEY, END)
        has_begun = False
        while found == KEY:
            parameter, _ = yield from self._collect(KEY_ENDS, MAX_NAME_LEN)
            yield from self._skip_space()
            yield from self._expect(VALUE)
            if not has_begun:
                self._begin_call(name)
                has_begun = True
            yield from self._read_value(parameter.strip(), VALUE_ENDS)
            found = yield from self._skip_mark(KEY, END)
        if found != END:
            raise Malformed
        if not has_begun:
            self._begin_call(name)
        self._end_call()


class Glm45Format(ToolCallFormat):
    """GLM-4.5, 4.6, 4.7."""

    parser = Glm45Parser
    marks = (BEGIN, END, KEY, KEY_END, VALUE, VALUE_END)
    trigger = BEGIN
    between = "\n"

    def call(self, lark: Lark, tool: Tool) -> str:
        def head(name: str) -> str:
            return f"{lark.mark(KEY)} {literal(name)} {lark.mark(KEY_END)} {line_break} {lark.mark(VALUE)}"

        line_break = lark.line_break()
        parameters = parameter_rules(lark, tool, head, ValueTags(VALUE_END, "", line_break))
        return f"{literal(tool.name)} {line_break} {parameters} {lark.mark(END)}"
