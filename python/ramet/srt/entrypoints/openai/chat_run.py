"""Owns a chat while its choices are generated: what the parsers read in each of them."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest
from ramet.srt.managers.generation import Generation, RunningSequence
from ramet.srt.text.output_events import Content, Event, Reasoning, ToolCallArguments, ToolCallStart
from ramet.srt.text.output_parser import OutputParser
from ramet.srt.text.tokenizer import Tokenizer


@dataclass(slots=True)
class ChoiceUpdate:
    """What one choice gained: events, of the output tokens [first_token, end_token) and those before them."""

    index: int
    events: list[Event]
    first_token: int
    end_token: int
    finish_reason: str | None  # in OpenAI's words


@dataclass
class ParsedCall:
    """A call of a function."""

    id: str
    name: str
    arguments: str = ""  # JSON, unless the output was cut off


@dataclass
class FinishedChoice:
    """All of one choice."""

    sequence: RunningSequence
    content: str = ""
    reasoning: str = ""
    tool_calls: list[ParsedCall] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, event: Event) -> None:
        """Take in what a parser tells."""
        if isinstance(event, Content):
            self.content += event.text
        elif isinstance(event, Reasoning):
            self.reasoning += event.text
        elif isinstance(event, ToolCallStart):
            self.tool_calls.append(ParsedCall(event.id, event.name))
        else:
            self.tool_calls[event.call_index].arguments += event.text


class ChatRun:
    """A chat that has been started.

    Args:
        make_parser: of one choice.
    """

    def __init__(
        self,
        body: ChatCompletionRequest,
        generation: Generation,
        make_parser: Callable[[], OutputParser],
        tokenizer: Tokenizer,
    ):
        self.body = body
        self._generation = generation
        self._tokenizer = tokenizer
        self._parsers = [make_parser() for _ in generation.sequences]
        self._num_reasoning = [0] * len(self._parsers)  # tokens
        self._num_open = [0] * len(self._parsers)  # tokens of which nothing has been told yet

    @property
    def sequences(self) -> Sequence[RunningSequence]:
        """That of each choice."""
        return self._generation.sequences

    async def updates(self) -> AsyncGenerator[ChoiceUpdate, None]:
        """What the choices gain, until all have ended. Leaving early aborts what still runs.

        Raises:
            RequestError, ServiceError: as Generation.updates.
        """
        async with aclosing(self._generation.updates()) as updates:
            async for update in updates:
                parser = self._parsers[update.index]
                events = parser.feed(update.text)
                reason = None
                if update.finish_reason is not None:
                    events += parser.finish()
                    reason = parser.finish_reason(update.finish_reason.type)
                self._count_reasoning(update.index, events, update.end_token - update.first_token)
                if self.body.include_reasoning is False:
                    events = [one for one in events if not isinstance(one, Reasoning)]
                yield ChoiceUpdate(update.index, merged(events), update.first_token, update.end_token, reason)

    async def finish(self) -> list[FinishedChoice]:
        """Wait until all choices have ended. Raises what `updates` raises; cancelling it aborts."""
        choices = [FinishedChoice(sequence) for sequence in self.sequences]
        async with aclosing(self.updates()) as updates:
            async for update in updates:
                choice = choices[update.index]
                for event in update.events:
                    choice.add(event)
                choice.finish_reason = update.finish_reason or ""
        return choices

    def num_reasoning_tokens(self, index: int | None = None) -> int:
        """How many tokens the reasoning of a choice takes so far; of all choices for None.

        Tokens that came at once with the beginning of the answer count as many as their text takes by itself.
        """
        return sum(self._num_reasoning) if index is None else self._num_reasoning[index]

    def _count_reasoning(self, index: int, events: Sequence[Event], num_tokens: int) -> None:
        self._num_open[index] += num_tokens
        reasoning = [one.text for one in events if isinstance(one, Reasoning)]
        if reasoning and len(reasoning) == len(events):
            self._num_reasoning[index] += self._num_open[index]
        elif reasoning:
            self._num_reasoning[index] += len(self._tokenizer.encode("".join(reasoning), add_special_tokens=False))
        if events:
            self._num_open[index] = 0


def merged(events: Sequence[Event]) -> list[Event]:
    """The events, with neighbours of one kind as one: a client gets as few pieces as say the same."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Content) and isinstance(last, Content):
            found[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments):
            found[-1] = ToolCallArguments(last.call_index, last.text + event.text)  # another call has begun in between
        else:
            found.append(event)
    return found
