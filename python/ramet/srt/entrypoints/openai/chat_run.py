"""Owns a chat while its choices are generated: what the parsers read in each of them."""

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from ramet.srt.entrypoints.openai.constraints import BodyConstraint
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest
from ramet.srt.entrypoints.openai.serving_base import openai_names
from ramet.srt.managers.generation import Generation, RunningSequence
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.text.output_events import Content, Event, Reasoning, ToolCallArguments, ToolCallStart, merged
from ramet.srt.text.output_parser import OutputParser


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
    arguments: str  # JSON, unless the output was cut off


@dataclass
class FinishedChoice:
    """All of one choice."""

    sequence: RunningSequence
    content: str
    reasoning: str
    tool_calls: list[ParsedCall]
    finish_reason: str


def finished_choice(sequence: RunningSequence, events: Iterable[Event], finish_reason: str) -> FinishedChoice:
    """What all that a parser has told adds up to."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCallStart] = []
    arguments: list[list[str]] = []  # of each call
    for event in events:
        if isinstance(event, Content):
            content.append(event.text)
        elif isinstance(event, Reasoning):
            reasoning.append(event.text)
        elif isinstance(event, ToolCallStart):
            calls.append(event)
            arguments.append([])
        else:
            assert isinstance(event, ToolCallArguments)
            arguments[event.call_index].append(event.text)
    parsed = [ParsedCall(call.id, call.name, "".join(texts)) for call, texts in zip(calls, arguments, strict=True)]
    return FinishedChoice(sequence, "".join(content), "".join(reasoning), parsed, finish_reason)


class ChatRun:
    """A chat that has been started.

    Args:
        constraint: what the output must keep to: errors name it as the body does.
        make_parser: of one choice.
    """

    def __init__(
        self,
        body: ChatCompletionRequest,
        constraint: BodyConstraint | None,
        generation: Generation,
        make_parser: Callable[[], OutputParser],
        manager: TokenizerManager,
    ):
        self.body = body
        self._constraint = constraint
        self._generation = generation
        self._manager = manager
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
            RequestError, ServiceError: as Generation.updates, in OpenAI's words.
        """
        with openai_names(self._constraint):
            async with aclosing(self._generation.updates()) as updates:
                async for update in updates:
                    parser = self._parsers[update.index]
                    events = parser.feed(update.text)
                    reason = None
                    if update.finish_reason is not None:
                        events += parser.finish()
                        reason = parser.finish_reason(update.finish_reason.type)
                    await self._count_reasoning(update.index, events, update.end_token - update.first_token)
                    if self.body.include_reasoning is False:
                        events = [one for one in events if not isinstance(one, Reasoning)]
                    yield ChoiceUpdate(update.index, merged(events), update.first_token, update.end_token, reason)

    async def finish(self) -> list[FinishedChoice]:
        """Wait until all choices have ended. Raises what `updates` raises; cancelling it aborts."""
        events: list[list[Event]] = [[] for _ in self.sequences]
        reasons = [""] * len(events)
        async with aclosing(self.updates()) as updates:
            async for update in updates:
                events[update.index] += update.events
                reasons[update.index] = update.finish_reason or ""
        return [finished_choice(*parts) for parts in zip(self.sequences, events, reasons, strict=True)]

    def num_reasoning_tokens(self, index: int | None = None) -> int:
        """How many tokens the reasoning of a choice takes so far; of all choices for None.

        Tokens that came at once with the beginning of the answer count as many as their text takes by itself.
        """
        return sum(self._num_reasoning) if index is None else self._num_reasoning[index]

    async def _count_reasoning(self, index: int, events: Sequence[Event], num_tokens: int) -> None:
        self._num_open[index] += num_tokens
        reasoning = [one.text for one in events if isinstance(one, Reasoning)]
        if reasoning and len(reasoning) == len(events):
            self._num_reasoning[index] += self._num_open[index]
        elif reasoning:
            self._num_reasoning[index] += await self._manager.count_tokens("".join(reasoning), add_special_tokens=False)
        if events:
            self._num_open[index] = 0
