"""Owns what the formats with a pair of tags for each parameter share: parameters become members of one JSON object.

A string comes as it is written, any other value when it is complete.
"""

import json

from ramet.srt.text.text_machine import Marks, Waiting
from ramet.srt.text.tool_calls.parser import ToolCallParser
from ramet.srt.text.tool_calls.xml_values import STRING_ONLY, parameter_kinds, write_value


class XmlCallParser(ToolCallParser):
    """Tells a call as `_begin_call`, any number of `_read_value`, and `_end_call`."""

    _name = ""
    _num_parameters = 0

    def _begin_call(self, name: str) -> None:
        self._start(name)
        self._name, self._num_parameters = name, 0
        self._arguments("{")

    def _read_value(self, name: str, ends: Marks) -> Waiting:
        """Read a parameter's value through its end. Where the text ends before it, so do the arguments."""
        self._arguments(f"{', ' if self._num_parameters else ''}{json.dumps(name, ensure_ascii=False)}: ")
        self._num_parameters += 1
        kinds = parameter_kinds(self._tools[self._name], name)
        if kinds == STRING_ONLY:
            self._arguments('"')
            if (yield from self._until(ends, lambda text: self._arguments(in_quotes(text)))) is not None:
                self._arguments('"')
            return
        pieces: list[str] = []
        found = yield from self._until(ends, pieces.append)
        text = "".join(pieces)
        self._arguments(text if found is None else write_value(text, kinds))

    def _end_call(self) -> None:
        self._arguments("}")
        self._end()


def in_quotes(text: str) -> str:
    """A text as it stands in a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
