"""Owns what the parsers of tool calls share: content until a call begins, calls, and content again.

White space beside a call is not content. What begins like a call and is none, of a known function, is content.
"""

import sys
from collections.abc import Generator, Sequence

from ramet.srt.text.output_events import ToolCallArguments, ToolCallStart
from ramet.srt.text.text_machine import Malformed, Marks, TextMachine, Waiting
from ramet.srt.text.tool_calls.tool import NewId, Tool, by_name, new_call_id


class ToolCallParser(TextMachine):
    """A subclass names the marks that calls begin with, and reads in `_read_calls` what follows one of them.

    Args:
        tools: those of the request: a call of any other is content.
        max_calls: further ones are content.
    """

    begin_marks: tuple[str, ...] = ()

    def __init__(self, tools: Sequence[Tool], *, new_id: NewId = new_call_id, max_calls: int = sys.maxsize):
        super().__init__()
        self.num_calls = 0
        self.is_in_call = False  # whether the one that began last lacks its end
        self._max_calls = max_calls
        self._mark = ""  # with which what is read has begun; "" if without any
        self._tools = by_name(tools)
        self._new_id = new_id

    def _run(self) -> Waiting:
        marks = Marks(self.begin_marks)
        is_after_call = False
        begins_plain = True  # where a call needs no mark
        while True:
            found = yield from self._find_begin(marks, is_after_call, begins_plain)
            if found is None:
                return
            self._mark, num_calls = found, self.num_calls
            try:
                yield from self._read_calls()
                self._settle()
                is_after_call = begins_plain = self.num_calls > num_calls
            except Malformed:
                self._tell_as_content()
                is_after_call = begins_plain = False

    def _read_calls(self) -> Waiting:
        """Read what follows the mark, and settle it; raise Malformed if it is no call."""
        raise NotImplementedError

    def _comes_plain(self) -> Generator[None, None, bool]:
        """Whether a call without a mark may come next: asked at the beginning and behind calls. Reads nothing."""
        yield from ()
        return False

    def _find_begin(self, marks: Marks, is_after_call: bool, begins_plain: bool) -> Generator[None, None, str | None]:
        """Tell content up to a place where a call may begin: its mark, "" for none, or None at the text's end.

        White space before the mark, and the mark, have been read and not told.
        """
        if begins_plain:
            yield from self._skip_space()
            if is_after_call:
                self._settle()
            if (yield from self._comes_plain()):
                return ""
            self._at = self._from
        while True:
            found = marks.find(self._text, self._at, self._is_last)
            end = found.start() if found is not None else marks.held(self._text, self._at)
            if found is None and self._is_last:
                self._at = len(self._text)
                self._tell_as_content()
                return None
            told = self._text[self._from : end].rstrip()
            self._content(told)
            self._from += len(told)
            if found is not None:
                self._at = found.end()
                return found.group()
            self._at = end
            yield

    # ---- telling ----

    def _start(self, name: str, call_id: str | None = None) -> None:
        """A call of a known function begins. What has been read is told by that."""
        self._tell(ToolCallStart(self.num_calls, call_id or self._new_id(), name))
        self.num_calls += 1
        self.is_in_call = True
        self._settle()

    def _end(self) -> None:
        """The call that began last has all its arguments. What has been read is told by that."""
        self.is_in_call = False
        self._settle()

    def _arguments(self, text: str) -> None:
        """A piece of the arguments of the call that began last."""
        if text:
            self._tell(ToolCallArguments(self.num_calls - 1, text))

    def _read_name(self) -> Generator[None, None, str]:
        """Read the name of a tool. Raises Malformed if something else comes."""
        yield from self._skip_space()
        return self._check_name((yield from self._take(*self._tools)) if self._tools else None)

    def _check_name(self, name: object) -> str:
        """Raises Malformed if no tool has the name, or there may be no further call."""
        if not isinstance(name, str) or name not in self._tools or self.num_calls >= self._max_calls:
            raise Malformed
        return name

    # ---- reading ----

    def _read_section(self, begin: str, end: str, section_end: str) -> Waiting:
        """Read calls between `begin` and `end` until their section ends. Raises Malformed if something else comes."""
        num_calls = self.num_calls
        while (mark := (yield from self._skip_mark(begin, section_end))) == begin:
            yield from self._read_call()
            yield from self._skip_mark(end)
            self._settle()
        if mark is None:
            yield from self._skip_space()
            if self._at < len(self._text) or self.num_calls == num_calls:  # not cut off behind a call
                raise Malformed

    def _read_call(self) -> Waiting:
        """Read one call of a section, behind the mark that begins it."""
        raise NotImplementedError

    def _read_arguments(self, name: str, call_id: str | None = None) -> Waiting:
        """Read the JSON object with a call's arguments, and tell the call."""
        yield from self._expect_object()
        self._start(name, call_id)
        yield from self._json(self._arguments)
        self._end()

    def _expect_object(self) -> Waiting:
        """Go to the beginning of a JSON object. Raises Malformed if something else comes."""
        yield from self._skip_space()
        if (yield from self._comes("{")) is None:
            raise Malformed

    def _skip_mark(self, *marks: str) -> Generator[None, None, str | None]:
        """Read white space and the mark behind it; if another text comes, nothing."""
        begin = self._at - self._from
        yield from self._skip_space()
        mark = yield from self._take(*marks)
        if mark is None:
            self._at = self._from + begin
        return mark
