"""Owns the reading of a text that comes in pieces: parsers written as generators that wait where they need more.

What a machine tells depends on the text alone, not on where it was cut: it decides when every longer text would have
it decide the same, and no later.
"""

import re
from collections.abc import Callable, Generator, Sequence

from ramet.srt.text.json_text import JsonText
from ramet.srt.text.output_events import Content, Event, Reasoning, merged

SPACE = re.compile(r"\s*")

Waiting = Generator[None, None, None]


class Malformed(Exception):  # noqa: N818 - says what the text is
    """The text is not what a parser took it for."""


class Marks:
    """Texts that are looked for."""

    def __init__(self, marks: Sequence[str]):
        self.texts = tuple(marks)
        self._pattern = re.compile("|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)))
        self._first = frozenset(mark[0] for mark in marks)
        self._beginnings = frozenset(mark[:length] for mark in marks for length in range(1, len(mark)))
        self._longest = max(map(len, marks), default=1)

    def find(self, text: str, at: int, is_last: bool) -> "re.Match[str] | None":
        """The first mark from place `at` on, the longest if several begin there; None, too, while that is open.

        Args:
            is_last: nothing follows `text`.
        """
        found = self._pattern.search(text, at) if self.texts else None
        if found is None or is_last or self.held(text, at) > found.start():
            return found
        return None

    def held(self, text: str, at: int) -> int:
        """Where the end of `text` begins that may be the beginning of a mark; its length if there is none."""
        for place in range(max(at, len(text) - self._longest + 1), len(text)):
            if text[place] in self._first and text[place:] in self._beginnings:
                return place
        return len(text)


class TextMachine:
    """A parser of one text. A subclass reads it in `_run`, which yields where it must wait for more.

    `_text[_from:]` has not been told yet, `_text[_at:]` has not been read yet.
    """

    def __init__(self) -> None:
        self._text = ""
        self._from = 0
        self._at = 0
        self._is_last = False  # nothing follows `_text`
        self._events: list[Event] = []
        self._steps = self._run()

    def feed(self, text: str) -> list[Event]:
        """What the next piece of text tells."""
        if not text:
            return []
        self._text = self._text[self._from :] + text
        self._at -= self._from
        self._from = 0
        return self._go_on()

    def finish(self) -> list[Event]:
        """The rest, now that the text has ended."""
        self._is_last = True
        return self._go_on()

    def _go_on(self) -> list[Event]:
        next(self._steps, None)
        events, self._events = self._events, []
        return merged(events)

    def _run(self) -> Waiting:
        raise NotImplementedError

    # ---- telling ----

    def _tell(self, event: Event) -> None:
        self._events.append(event)

    def _content(self, text: str) -> None:
        if text:
            self._tell(Content(text))

    def _reasoning(self, text: str) -> None:
        if text:
            self._tell(Reasoning(text))

    def _settle(self) -> None:
        """What has been read has been told, or needn't be."""
        self._from = self._at

    def _tell_as_content(self) -> None:
        """What has been read and not told is content."""
        self._content(self._text[self._from : self._at])
        self._settle()

    # ---- reading ----

    def _comes(self, *marks: str) -> Generator[None, None, str | None]:
        """The mark that comes next, the longest of those that do; None if there is none. Reads nothing."""
        longest = max(map(len, marks))
        while True:
            rest = self._text[self._at : self._at + longest]
            if self._is_last or not any(len(mark) > len(rest) and mark.startswith(rest) for mark in marks):
                return max(filter(rest.startswith, marks), key=len, default=None)
            yield

    def _take(self, *marks: str) -> Generator[None, None, str | None]:
        """As `_comes`, and read the mark."""
        mark = yield from self._comes(*marks)
        if mark is not None:
            self._at += len(mark)
        return mark

    def _expect(self, mark: str) -> Waiting:
        """Read the mark. Raises Malformed if something else comes."""
        if (yield from self._take(mark)) is None:
            raise Malformed

    def _skip_space(self) -> Waiting:
        """Read white space."""
        while True:
            found = SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text) or self._is_last:
                return
            yield

    def _until(
        self, marks: Marks, tell: Callable[[str], None], is_trimmed: bool = False
    ) -> Generator[None, None, str | None]:
        """Tell the text before the next mark as it comes, read the mark too, and return it; None at the text's end.

        Args:
            is_trimmed: white space before the mark is not told.
        """
        while True:
            self._settle()
            found = marks.find(self._text, self._at, self._is_last)
            if found is not None:
                before = self._text[self._at : found.start()]
                tell(before.rstrip() if is_trimmed else before)
                self._at = found.end()
                self._settle()
                return found.group()
            end = len(self._text) if self._is_last else marks.held(self._text, self._at)
            if is_trimmed and not self._is_last:
                end = self._at + len(self._text[self._at : end].rstrip())
            tell(self._text[self._at : end])
            self._at = end
            self._settle()
            if self._is_last:
                return None
            yield

    def _collect(self, marks: Marks, max_len: int) -> Generator[None, None, tuple[str, str]]:
        """Read up to the next mark and through it; the text before it, and the mark.

        Raises:
            Malformed: if there is none within `max_len` characters, or at all.
        """
        begin = self._at - self._from
        while True:
            start = self._from + begin
            found = marks.find(self._text, start, self._is_last)
            if found is not None and found.start() - start <= max_len:
                self._at = found.end()
                return self._text[start : found.start()], found.group()
            if found is not None or marks.held(self._text, start) - start > max_len or self._is_last:
                raise Malformed
            yield

    def _json(self, tell: Callable[[str], None] | None = None) -> Generator[None, None, str]:
        """Read one JSON value; its text, with line breaks and such in strings as escapes.

        Args:
            tell: gets the text as it comes instead; then "" is returned.

        Raises:
            Malformed: where no JSON value can go on, and at the text's end.
        """
        reader, pieces = JsonText(), []
        while True:
            self._at, piece = reader.take(self._text, self._at)
            if tell is None:
                pieces.append(piece)
            elif piece:
                tell(piece)
            if tell is not None:
                self._settle()
            if reader.is_done:
                return "".join(pieces)
            if reader.is_bad or self._is_last:
                raise Malformed
            yield
