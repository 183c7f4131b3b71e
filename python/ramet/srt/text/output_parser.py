"""Owns the parsing of one output: pieces of text become content, reasoning and tool calls, in order."""

from collections.abc import Sequence

from ramet.srt.text.output_events import Content, Event, Reasoning
from ramet.srt.text.reasoning.think_parser import ThinkParser
from ramet.srt.text.text_machine import Marks
from ramet.srt.text.tool_calls.parser import ToolCallParser

TOOL_CALLS = "tool_calls"  # OpenAI's finish reason


class HiddenTokens:
    """Special tokens whose texts are taken out."""

    def __init__(self, texts: Sequence[str]):
        self.marks = Marks(texts)


class HiddenTokenFilter:
    """Takes them out of one output."""

    def __init__(self, hidden: HiddenTokens):
        self._marks = hidden.marks
        self._text = ""  # may be the beginning of one

    def feed(self, text: str, is_last: bool = False) -> str:
        """The text without them, as far as it is decided; the rest where nothing follows."""
        text, shown, at = self._text + text, [], 0
        while (found := self._marks.find(text, at, is_last)) is not None:
            shown.append(text[at : found.start()])
            at = found.end()
        end = len(text) if is_last else self._marks.held(text, at)
        self._text = text[end:]
        return "".join([*shown, text[at:end]])


class OutputParser:
    """Feed it the text as it comes, then finish it. What it tells does not depend on where the text was cut.

    Args:
        stages: parsers; each gets the content that the one before it tells.
        hidden: what to take out before.
    """

    def __init__(
        self,
        stages: Sequence[ThinkParser | ToolCallParser],
        hidden: HiddenTokens | None,
        *,
        separate_reasoning: bool = True,
        stream_reasoning: bool = True,
    ):
        self._stages = stages
        self._filter = None if hidden is None else HiddenTokenFilter(hidden)
        self._separates = separate_reasoning
        self._streams = stream_reasoning
        self._reasoning: list[str] = []  # that waits for its end

    def finish_reason(self, reason: str) -> str:
        """What a choice ends with whose tokens end with `reason`: "tool_calls" in place of "stop" where it has calls.

        Not if the last one is cut off, by a stop string for example: it can't be run.
        """
        parsers = [stage for stage in self._stages if isinstance(stage, ToolCallParser) and stage.num_calls]
        return TOOL_CALLS if reason == "stop" and parsers and not parsers[-1].is_in_call else reason

    def feed(self, text: str) -> list[Event]:
        """What the next piece of text tells."""
        if self._filter is not None:
            text = self._filter.feed(text)
        return self._tell(self._run_stages(text, 0, is_last=False), is_last=False)

    def finish(self) -> list[Event]:
        """The rest, now that the text has ended."""
        text = "" if self._filter is None else self._filter.feed("", is_last=True)
        return self._tell(self._run_stages(text, 0, is_last=True), is_last=True)

    def _run_stages(self, text: str, first: int, is_last: bool) -> list[Event]:
        if first == len(self._stages):
            return [Content(text)] if text else []
        stage = self._stages[first]
        events = stage.feed(text)
        if is_last:
            events += stage.finish()
        told: list[Event] = []
        for event in events:
            told += self._run_stages(event.text, first + 1, False) if isinstance(event, Content) else [event]
        if is_last:
            told += self._run_stages("", first + 1, True)
        return told

    def _tell(self, events: list[Event], is_last: bool) -> list[Event]:
        told: list[Event] = []
        for event in events:
            if not isinstance(event, Reasoning):
                told += self._held()
                told.append(event)
            elif not self._separates:
                told.append(Content(event.text))
            elif self._streams:
                told.append(event)
            else:
                self._reasoning.append(event.text)
        return told + self._held() if is_last else told

    def _held(self) -> list[Event]:
        pieces, self._reasoning = self._reasoning, []
        return [Reasoning("".join(pieces))] if pieces else []
