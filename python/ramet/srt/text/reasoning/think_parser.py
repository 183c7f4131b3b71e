"""Owns the parser of reasoning that stands between two marks at the beginning of an output: <think>…</think>.

White space around the marks belongs to them. Later marks are content: a model may write of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ramet.srt.text.text_machine import Marks, TextMachine, Waiting


class ThinkMarks(NamedTuple):
    """A pair of marks."""

    begin: str
    end: str


class ThinkParser(TextMachine):
    """Tells reasoning, then everything else as content.

    Args:
        pairs: the marks that may stand around the reasoning.
        is_open: it has begun in the prompt, with the first pair's mark.
        interrupts: marks that end it, too, and are content.
        separates: tell it as reasoning; otherwise it is told with its marks, as content that isn't parsed further.
    """

    def __init__(
        self, pairs: Sequence[ThinkMarks], is_open: bool, interrupts: Sequence[str] = (), separates: bool = True
    ):
        super().__init__()
        self._pairs = pairs
        self._is_open = is_open
        self._interrupts = tuple(interrupts)
        self._separates = separates

    def _run(self) -> Waiting:
        yield from self._skip_space()
        pairs = self._pairs[:1] if self._is_open else self._pairs
        mark = yield from self._take(*(pair.begin for pair in pairs))  # some models repeat the prompt's
        if self._is_open or mark is not None:
            end = next((pair.end for pair in pairs if pair.begin == mark), pairs[0].end)
            yield from self._read_reasoning(end)
        else:
            self._at = self._from  # white space is content
        while True:
            self._at = len(self._text)
            self._tell_as_content()
            if self._is_last:
                return
            yield

    def _read_reasoning(self, end: str) -> Waiting:
        if not self._separates:
            self._reasoning(self._text[self._from : self._at])
        else:
            yield from self._skip_space()
        found = yield from self._until(Marks((end, *self._interrupts)), self._reasoning, is_trimmed=self._separates)
        if found in self._interrupts:
            self._at -= len(found)
        elif found is not None:
            if not self._separates:
                self._reasoning(found)
            yield from self._skip_space()
            if not self._separates:
                self._reasoning(self._text[self._from : self._at])
        self._settle()
