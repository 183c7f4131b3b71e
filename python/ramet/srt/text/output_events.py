"""Owns what the parsers of model output tell: pieces of content, reasoning and tool calls, in the order of the text."""

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
