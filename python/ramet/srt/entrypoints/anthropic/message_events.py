"""Owns the events of which a message is made: from what the parsers of output tell to blocks and their pieces.

A stream sends them, a whole answer is their sum. Source: the published `anthropic` client's way to add them up.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pydantic_core

from ramet.srt.errors import ServiceError
from ramet.srt.text.output_events import Content, Event, Reasoning, ToolCallStart

MessageEvent = dict[str, Any]
LAST_NUMBER = re.compile(r"[-+.0-9eE]+\Z")  # of which more may have followed
# What a block begins as, and the delta by which it grows: its type, and the field that both have.
TEXT = ({"type": "text", "text": ""}, "text_delta", "text")
THINKING = ({"type": "thinking", "thinking": "", "signature": ""}, "thinking_delta", "thinking")


class MessageEvents:
    """Makes the events of one message.

    Args:
        shows_thinking: without, blocks of thinking are there and empty.
    """

    def __init__(self, *, shows_thinking: bool = True):
        self._shows_thinking = shows_thinking
        self._num_blocks = 0
        self._open = ""  # the type of the block that grows, if one does

    def begin(self, message: Mapping[str, Any]) -> list[MessageEvent]:
        """The first event: the message, without content."""
        return [{"type": "message_start", "message": dict(message)}]

    def add(self, events: Iterable[Event]) -> list[MessageEvent]:
        """What an output's next events are."""
        made: list[MessageEvent] = []
        for event in events:
            if isinstance(event, Content):
                if event.text:
                    made += [*self._in_block(TEXT[0]), self._delta(TEXT[1], TEXT[2], event.text)]
            elif isinstance(event, Reasoning):
                if event.text:
                    made += self._in_block(THINKING[0])
                    if self._shows_thinking:
                        made.append(self._delta(THINKING[1], THINKING[2], event.text))
            elif isinstance(event, ToolCallStart):
                block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
                made += [*self._close(), *self._in_block(block)]
            elif event.text:  # of the call that has begun last
                made.append(self._delta("input_json_delta", "partial_json", event.text))
        return made

    def end(
        self, stop_reason: str, stop_sequence: str | None, usage: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> list[MessageEvent]:
        """The last events.

        Args:
            metadata: which weights have answered; no field of Anthropic's.
        """
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        return [
            *self._close(),
            {"type": "message_delta", "delta": delta, "usage": dict(usage), "metadata": dict(metadata)},
            {"type": "message_stop"},
        ]

    def _in_block(self, block: Mapping[str, Any]) -> list[MessageEvent]:
        """Begin a block, unless one of its type grows."""
        if self._open == block["type"]:
            return []
        made = self._close()
        self._open = block["type"]
        self._num_blocks += 1
        made.append({"type": "content_block_start", "index": self._num_blocks - 1, "content_block": dict(block)})
        if self._num_blocks == 1:
            made.append({"type": "ping"})
        return made

    def _close(self) -> list[MessageEvent]:
        closed, self._open = self._open, ""
        if not closed:
            return []
        # Clients keep thinking for later only where it is signed.
        made = [self._delta("signature_delta", "signature", "")] if closed == "thinking" else []
        return [*made, {"type": "content_block_stop", "index": self._num_blocks - 1}]

    def _delta(self, kind: str, name: str, text: str) -> MessageEvent:
        return {
            "type": "content_block_delta",
            "index": self._num_blocks - 1,
            "delta": {"type": kind, name: text},
        }


def whole_message(events: Iterable[MessageEvent]) -> dict[str, Any]:
    """The message that the events add up to."""
    message: dict[str, Any] = {}
    pieces: list[list[str]] = []  # of each block
    for event in events:
        if event["type"] == "message_start":
            message = {**event["message"], "content": []}
        elif event["type"] == "content_block_start":
            message["content"].append(dict(event["content_block"]))
            pieces.append([])
        elif event["type"] == "content_block_delta":
            _, text = event["delta"].values()
            pieces[event["index"]].append(text)
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] = message["usage"] | event["usage"]
            message["metadata"] = event["metadata"]
    for block, texts in zip(message["content"], pieces, strict=True):
        text = "".join(texts)
        if block["type"] == "tool_use":
            block["input"] = tool_input(text)
        else:
            block[block["type"]] = text
    return message


def tool_input(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object; of a JSON text that was cut off, what is complete.

    The published client reads a stream's pieces with the same library. It takes a number at the end for a whole one.

    Raises:
        ServiceError: if the text is not the beginning of an object.
    """
    if not arguments.strip():
        return {}
    try:
        try:
            value = pydantic_core.from_json(arguments)
        except ValueError:
            value = pydantic_core.from_json(LAST_NUMBER.sub("", arguments), allow_partial=True)
    except ValueError as error:
        raise ServiceError(f"the arguments of a tool call are no JSON: {error}", status_code=500) from None
    if not isinstance(value, dict):
        raise ServiceError("the arguments of a tool call are no JSON object", status_code=500)
    return value
