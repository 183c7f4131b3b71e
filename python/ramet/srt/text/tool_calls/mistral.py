"""Owns the calls of Mistral: [TOOL_CALLS] and a list of {"name": …, "arguments": {…}}, or since 2025 for each call
[TOOL_CALLS]name[ARGS]{…}, where [CALL_ID] and an id may follow the name.
"""

import re
import sys
from collections.abc import Sequence

from ramet.srt.text.text_machine import Malformed, Marks, Waiting
from ramet.srt.text.tool_calls.format import ToolCallFormat
from ramet.srt.text.tool_calls.hermes import json_call
from ramet.srt.text.tool_calls.json_call import JsonCallParser
from ramet.srt.text.tool_calls.lark import Lark, literal
from ramet.srt.text.tool_calls.tool import NewId, Tool, new_short_call_id

BEGIN, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
ID_ENDS = Marks((ARGS,))
MAX_ID_LEN = 64


class MistralParser(JsonCallParser):
    """Reads both forms."""

    begin_marks = (BEGIN,)

    def __init__(self, tools: Sequence[Tool], *, new_id: NewId = new_short_call_id, max_calls: int = sys.maxsize):
        super().__init__(tools, new_id=new_id, max_calls=max_calls)

    def _read_calls(self) -> Waiting:
        yield from self._skip_space()
        if (yield from self._take("[")) is not None:
            yield from self._read_list()
        elif (yield from self._comes("{")) is not None:
            yield from self._read_call_object()
        else:
            yield from self._read_named_call()

    def _read_list(self) -> Waiting:
        while True:
            yield from self._read_call_object()
            sign = yield from self._skip_mark(",", "]")
            if sign is None:
                raise Malformed
            if sign == "]":
                return

    def _read_named_call(self) -> Waiting:
        name, call_id = (yield from self._read_name()), None
        mark = yield from self._skip_mark(ARGS, CALL_ID)
        if mark == CALL_ID:
            text, _ = yield from self._collect(ID_ENDS, MAX_ID_LEN)
            call_id = text.strip() if re.fullmatch(r"[A-Za-z0-9]{9}", text.strip()) else None
        yield from self._read_arguments(name, call_id)


class MistralFormat(ToolCallFormat):
    """Mistral, Ministral, Magistral, Devstral."""

    parser = MistralParser
    marks = (BEGIN, ARGS, CALL_ID)
    trigger = BEGIN

    def __init__(self, template: str):
        super().__init__(template)
        self.is_sectioned = ARGS not in template  # a list behind one mark
        self.between = ", " if self.is_sectioned else ""

    def call(self, lark: Lark, tool: Tool) -> str:
        if self.is_sectioned:
            call = json_call(lark, tool, "arguments").removesuffix(literal("}"))
            return f'{call} (", \\"id\\": \\"" /[A-Za-z0-9]{{9}}/ "\\"")? {literal("}")}'
        call_id = f"{lark.mark(CALL_ID)} /[A-Za-z0-9]{{9}}/" if CALL_ID in self.template else ""
        return f"{literal(tool.name)} {call_id} {lark.mark(ARGS)} {lark.json(tool.schema)}"

    def section(self, lark: Lark, calls: str) -> str:
        return f'(" ")? {lark.mark("[")} {calls} {lark.mark("]")}'
