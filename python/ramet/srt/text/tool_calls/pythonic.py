"""Owns calls as a list of Python calls: [f(a=1), g(b="x")], also between <|python_start|> and <|python_end|>.

Nothing is ever run: the arguments are read as literals.
"""

import re
from collections.abc import Generator, Mapping, Sequence

from ramet.srt.text.text_machine import Malformed, Marks, Waiting
from ramet.srt.text.tool_calls.format import ToolCallFormat
from ramet.srt.text.tool_calls.json_call import write_json
from ramet.srt.text.tool_calls.lark import Lark, literal
from ramet.srt.text.tool_calls.parser import ToolCallParser
from ramet.srt.text.tool_calls.tool import Tool
from ramet.srt.text.tool_calls.xml_grammar import all_parameters, by_itself, check_object_keys, required_names
from ramet.srt.text.tool_calls.xml_values import read_literal

BEGIN, START, END = "[", "<|python_start|>", "<|python_end|>"
KEY_ENDS = Marks(("=",))
MAX_NAME_LEN, MAX_DEPTH = 256, 64
PLAIN = re.compile(r"[^\"'()\[\]{},]+")
CLOSING = {"(": ")", "[": "]", "{": "}"}
QUOTED = {sign: re.compile(rf"[^{sign}\\\n]+") for sign in "\"'"}


class PythonicParser(ToolCallParser):
    """Reads lists of calls. An argument comes when it is complete."""

    begin_marks = (BEGIN, START)

    def _read_calls(self) -> Waiting:
        if self._mark == START:
            yield from self._skip_space()
            yield from self._expect(BEGIN)
        sign = ","
        while sign == ",":
            yield from self._read_call()
            yield from self._skip_space()
            sign = (yield from self._take(",", "]")) or ""
        if sign != "]":
            raise Malformed
        if self._mark == START:
            yield from self._skip_mark(END)

    def _read_call(self) -> Waiting:
        name = yield from self._read_name()
        yield from self._skip_space()
        yield from self._expect("(")
        yield from self._skip_space()
        if (yield from self._take(")")) is not None:
            self._start(name)
            self._arguments("{}")
            self._end()
            return
        before = "{"
        while True:
            key, _ = yield from self._collect(KEY_ENDS, MAX_NAME_LEN)
            if not key.strip().isidentifier():
                raise Malformed
            text, sign = yield from self._read_argument()
            if before == "{":  # not before: f(a=b) is no call
                self._start(name)
            self._arguments(f"{before}{write_json(key.strip())}: {text}")
            self._settle()
            if sign == ",":
                yield from self._skip_space()
                sign = (yield from self._take(")")) or sign
            if sign == ")":
                self._arguments("}")
                self._end()
                return
            before = ", "

    def _read_argument(self) -> Generator[None, None, tuple[str, str]]:
        """Read a value and the sign behind it, ")" or ","; the value as JSON."""
        pieces: list[str] = []
        closing: list[str] = []
        quote = ""
        while True:
            while self._at < len(self._text):
                sign = self._text[self._at]
                if quote:
                    if sign == "\\" and self._at + 1 == len(self._text):
                        break
                    quote = self._read_in_quotes(sign, quote, pieces)
                elif found := PLAIN.match(self._text, self._at):
                    pieces.append(found.group())
                    self._at = found.end()
                elif not closing and sign in "),":
                    self._at += 1
                    _, text = read_literal("".join(pieces).strip())
                    return text, sign
                else:
                    quote = self._read_sign(sign, closing)
                    pieces.append(sign)
            if self._is_last:
                raise Malformed
            yield

    def _read_in_quotes(self, sign: str, quote: str, pieces: list[str]) -> str:
        """Read a part of a string; the quote if it goes on, "" if it has ended."""
        if found := QUOTED[quote].match(self._text, self._at):
            pieces.append(found.group())
            self._at = found.end()
            return quote
        num_signs = 2 if sign == "\\" else 1
        text = self._text[self._at : self._at + num_signs]
        pieces.append("\\n" if text == "\n" else text)  # models write line breaks as they are
        self._at += num_signs
        return "" if sign == quote else quote

    def _read_sign(self, sign: str, closing: list[str]) -> str:
        """Read a bracket, comma or quote outside of strings; the quote that it opens, or ""."""
        if sign in CLOSING and len(closing) < MAX_DEPTH:
            closing.append(CLOSING[sign])
        elif closing and sign == closing[-1]:
            closing.pop()
        elif sign not in "\"'" and not (sign == "," and closing):
            raise Malformed
        self._at += 1
        return sign if sign in "\"'" else ""


class PythonicFormat(ToolCallFormat):
    """Llama 4, ToolACE, Llama 3.2 and Gemma 3 with pythonic templates."""

    parser = PythonicParser
    marks = (START, END)
    trigger = None
    is_sectioned = True
    between = ", "

    def section(self, lark: Lark, calls: str) -> str:
        return f"{lark.mark('[')} {calls} {lark.mark(']')}"

    def call(self, lark: Lark, tool: Tool) -> str:
        check_object_keys(tool)
        members = []
        for name, schema in all_parameters(tool).items():
            if not name.isidentifier():
                raise ValueError(f"tool {tool.name!r}: {name!r} can't be the name of a parameter in Python")
            value = lark.json(by_itself(tool, schema if isinstance(schema, Mapping) else {}))
            members.append((f"{literal(f'{name}=')} {value}", name in required_names(tool)))
        return f'{literal(f"{tool.name}(")} {joined(members)} ")"'


def joined(members: Sequence[tuple[str, bool]]) -> str:
    """The expression of members with commas between; those that aren't required may be left out."""
    if not members:
        return ""
    (first, is_required), rest = members[0], members[1:]
    behind = " ".join(f'(", " {member})' if needed else f'(", " {member})?' for member, needed in rest)
    if is_required:
        return f"{first} {behind}"
    without = joined(rest) or literal("")
    return f"({first} {behind} | {without})"
