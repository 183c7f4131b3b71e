"""Owns what the parsers of model output tell: pieces of content, reasoning and tool calls, in the order of the text."""

from itertools import groupby
from typing import NamedTuple


class Content(NamedTuple):
    """A piece of the answer."""

    text: str


class Reasoning(NamedTuple):
    """A piece of what the model thinks before its answer."""

    text: str


class ToolCallStart(NamedTuple):
    """A call of a function of the request. Its arguments follow."""

    call_index: int  # among the calls of the output, from 0
    id: str
    name: str


class ToolCallArguments(NamedTuple):
    """A piece of the JSON text of a call's arguments: joined they are one object, unless the output was cut off."""

    call_index: int
    text: str


Event = Content | Reasoning | ToolCallStart | ToolCallArguments


def merged(events: list[Event]) -> list[Event]:
    """The events with neighbours of one kind as one: as few pieces as say the same."""
    if len(events) < 2:
        return events
    found: list[Event] = []
    for _, group in groupby(events, type):
        first, *others = group
        if isinstance(first, ToolCallStart):
            found += [first, *others]
        elif others:  # arguments are of one call: another one has its beginning between
            texts = [one.text for one in (first, *others) if not isinstance(one, ToolCallStart)]
            found.append(first._replace(text="".join(texts)))
        else:
            found.append(first)
    return found
