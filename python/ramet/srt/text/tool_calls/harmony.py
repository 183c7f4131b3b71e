"""Owns gpt-oss's messages: reasoning, answer and tool calls in channels of one format, harmony, read as text.

Source: OpenAI's harmony response format. The published `openai-harmony` reads the same from token ids, with a
vocabulary that it downloads; here the tokens' texts are enough.
"""

import re
import sys
from collections.abc import Callable, Generator, Sequence

from ramet.srt.text.output_events import Content, Reasoning
from ramet.srt.text.text_machine import Malformed, Marks, Waiting
from ramet.srt.text.tool_calls.format import ToolCallFormat
from ramet.srt.text.tool_calls.lark import Lark, literal
from ramet.srt.text.tool_calls.parser import ToolCallParser
from ramet.srt.text.tool_calls.tool import NewId, Tool, new_call_id

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
HEADER_ENDS = Marks((MESSAGE,))
BODY_ENDS = Marks((START, CHANNEL, END, CALL, RETURN))
PREFIX = "functions."
MAX_HEADER_LEN = 1024


class HarmonyParser(ToolCallParser):
    """Reads messages. A call of an unknown function is content, with its header.

    Args:
        separates: tell the analysis channel as reasoning; otherwise it is content, with its marks.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        new_id: NewId = new_call_id,
        max_calls: int = sys.maxsize,
        separates: bool = True,
    ):
        super().__init__(tools, new_id=new_id, max_calls=max_calls)
        self._separates = separates
        self._kind: type[Content] | type[Reasoning] = Content  # of the message under way
        self._kinds: set[type[Content] | type[Reasoning]] = set()  # of those before it
        self._needs_break = False  # before the text of the message under way

    def _run(self) -> Waiting:
        begins: tuple[str, ...] = (START, CHANNEL, " to=")  # behind "assistant", with which the prompt ends
        while True:
            mark = yield from self._take(*begins)
            begins = (START, CHANNEL)
            if mark is None:
                if self._is_last and self._at == len(self._text):
                    return
                yield from self._read_body(self._content)
                continue
            try:
                yield from self._read_message(mark)
            except Malformed:
                self._tell_as_content()

    def _read_message(self, mark: str) -> Waiting:
        header, _ = yield from self._collect(HEADER_ENDS, MAX_HEADER_LEN)
        header = mark + header
        channel, recipient = re.search(r"<\|channel\|>\s*(\w+)", header), re.search(r"\bto=([^\s<]+)", header)
        if recipient is not None:
            yield from self._read_call(recipient[1])
        elif channel is None or channel[1] not in ("analysis", "commentary", "final"):
            raise Malformed
        elif channel[1] == "analysis":
            yield from self._read_analysis()
        else:
            self._begin(Content)
            yield from self._read_body(self._tell_text)

    def _read_call(self, recipient: str = "") -> Waiting:
        if not recipient.startswith(PREFIX):
            raise Malformed
        name = self._check_name(recipient.removeprefix(PREFIX))
        yield from self._expect_object()
        self._start(name)
        yield from self._json(self._arguments)
        self._end()
        yield from self._skip_mark(END, CALL, RETURN)
        self._settle()

    def _read_analysis(self) -> Waiting:
        if self._separates:
            self._begin(Reasoning)
            yield from self._read_body(self._tell_text)
            return
        self._tell_as_content()
        self._content((yield from self._read_body(self._content)))

    def _read_body(self, tell: Callable[[str], None]) -> Generator[None, None, str]:
        """Tell a message's text; the mark that ends it, "" where the next message begins or the text ends."""
        mark = yield from self._until(BODY_ENDS, tell)
        if mark in (START, CHANNEL):
            self._at -= len(mark)
            self._settle()
            return ""
        return mark or ""

    def _begin(self, kind: type[Content] | type[Reasoning]) -> None:
        self._settle()
        self._needs_break = kind in self._kinds
        self._kind = kind

    def _tell_text(self, text: str) -> None:
        """Tell a piece of a message; a line break stands between two of a kind."""
        if text:
            self._tell(self._kind(f"\n{text}" if self._needs_break else text))
            self._needs_break = False
            self._kinds.add(self._kind)


class HarmonyFormat(ToolCallFormat):
    """gpt-oss."""

    parser = HarmonyParser
    marks = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
    trigger = None
    is_sectioned = True
    between = None

    def call(self, lark: Lark, tool: Tool) -> str:
        channel, to = lark.mark(CHANNEL), literal(f" to={PREFIX}{tool.name}")
        kind = f'(" json" | " " {lark.mark(CONSTRAIN)} "json")?'
        head = f'({to} {channel} "commentary" | {channel} "commentary" {to}) {kind}'
        return f"{head} {lark.mark(MESSAGE)} {lark.json(tool.schema)}"

    def section(self, lark: Lark, calls: str) -> str:
        """Any number of messages of the analysis and commentary channels, and the call, which ends the output."""
        return f"{self.before(lark)}* {calls}"

    def before(self, lark: Lark) -> str:
        """The expression of one message that may come before the last one."""
        head = f'{lark.mark(CHANNEL)} ("analysis" | "commentary") {lark.mark(MESSAGE)}'
        return lark.rule("before", f'{head} {lark.through(END, "message")} {lark.mark(START)} "assistant"')
