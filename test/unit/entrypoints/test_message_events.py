"""The events of a message: their order, what they add up to, and that it is the same however the output was cut."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ramet.srt.entrypoints.anthropic.message_events import MessageEvent, MessageEvents, tool_input, whole_message
from ramet.srt.errors import ServiceError
from ramet.srt.text.output_events import Content, Event, Reasoning, ToolCallArguments, ToolCallStart

METADATA = {"weight_version": "default"}
BEGINNING = {"id": "msg_1", "role": "assistant", "content": [], "stop_reason": None, "usage": {"input_tokens": 3}}
OUTPUT = [
    Reasoning("let me\nthink"),
    Content("I look: ü"),
    ToolCallStart(0, "call_1", "weather"),
    ToolCallArguments(0, '{"city": "Ulm", "days": [1, 2]}'),
    ToolCallStart(1, "call_2", "time"),
    ToolCallStart(2, "call_3", "time"),
    ToolCallArguments(2, "{}"),
    Content("done"),
]
BLOCKS = [
    {"type": "thinking", "thinking": "let me\nthink", "signature": ""},
    {"type": "text", "text": "I look: ü"},
    {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Ulm", "days": [1, 2]}},
    {"type": "tool_use", "id": "call_2", "name": "time", "input": {}},
    {"type": "tool_use", "id": "call_3", "name": "time", "input": {}},
    {"type": "text", "text": "done"},
]


def events_of(*updates: list[Event], **options: Any) -> list[MessageEvent]:
    events = MessageEvents(**options)
    made = events.begin(BEGINNING)
    for update in updates:
        made += events.add(update)
    return made + events.end("tool_use", None, {"output_tokens": 9}, METADATA)


def cut(event: Event, places: list[int]) -> list[Event]:
    """The event in pieces, some of them empty."""
    if isinstance(event, ToolCallStart):
        return [event]
    bounds = [0, *sorted(place % (len(event.text) + 1) for place in places), len(event.text)]
    return [event._replace(text=event.text[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def read(events: list[MessageEvent]) -> list[dict[str, Any]]:
    """The blocks as a strict client reads them: it asserts the protocol."""
    blocks: list[dict[str, Any]] = []
    is_open, num_pings = False, 0
    assert events[0]["type"] == "message_start" and events[-1] == {"type": "message_stop"}
    for event in events[1:-2]:
        if event["type"] == "ping":
            num_pings += 1
            continue
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(blocks)
            is_open = True
            blocks.append({**event["content_block"], "json": ""})
            continue
        assert is_open and event["index"] == len(blocks) - 1
        if event["type"] == "content_block_stop":
            is_open = False
            continue
        assert event["type"] == "content_block_delta"
        kind, delta, block = event["delta"]["type"], event["delta"], blocks[-1]
        owner, name, source = {
            "text_delta": ("text", "text", "text"),
            "thinking_delta": ("thinking", "thinking", "thinking"),
            "signature_delta": ("thinking", "signature", "signature"),
            "input_json_delta": ("tool_use", "json", "partial_json"),
        }[kind]
        assert block["type"] == owner and (delta[source] or kind == "signature_delta")
        block[name] += delta[source]
    assert not is_open and num_pings == bool(blocks)
    assert events[-2]["type"] == "message_delta"
    for block in blocks:
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = tool_input(text)
    return blocks


def test_a_whole_message() -> None:
    message = whole_message(events_of(OUTPUT))
    assert message == {
        "id": "msg_1",
        "role": "assistant",
        "content": BLOCKS,
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 9},
        "metadata": METADATA,
    }


@given(st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=len(OUTPUT), max_size=len(OUTPUT)), st.data())
def test_however_it_is_cut_the_deltas_add_up_to_it(places: list[list[int]], data: st.DataObject) -> None:
    pieces = [piece for event, cuts in zip(OUTPUT, places, strict=True) for piece in cut(event, cuts)]
    ends = sorted(data.draw(st.lists(st.integers(0, len(pieces)), max_size=5)))
    updates = [pieces[a:b] for a, b in zip([0, *ends], [*ends, len(pieces)], strict=True)]
    events = events_of(*updates)
    assert read(events) == BLOCKS
    assert whole_message(events) == whole_message(events_of(OUTPUT))


def test_the_order_of_events() -> None:
    kinds = [event["type"].removeprefix("content_block_") for event in events_of([Content("a")], [Content("b")])]
    assert kinds == ["message_start", "start", "ping", "delta", "delta", "stop", "message_delta", "message_stop"]


def test_an_empty_output_has_no_block() -> None:
    events = events_of([Content("")])
    assert [event["type"] for event in events] == ["message_start", "message_delta", "message_stop"]
    assert whole_message(events)["content"] == []


def test_thinking_that_is_not_to_be_shown() -> None:
    events = events_of([Reasoning("secret")], [Reasoning("ly"), Content("a")], shows_thinking=False)
    empty = {"type": "thinking", "thinking": "", "signature": ""}
    assert read(events) == whole_message(events)["content"] == [empty, {"type": "text", "text": "a"}]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("", {}),
        (" ", {}),
        ('{"a": 1}', {"a": 1}),
        ('{"a": {"b": [1, 2', {"a": {"b": [1]}}),
        ('{"a": "x", "b": "y', {"a": "x"}),
        ('{"a": "x", "b": tru', {"a": "x"}),
        ('{"a": 1.5e', {}),
        ("{", {}),
    ],
)
def test_of_arguments_that_were_cut_off_what_is_complete_is_there(arguments: str, value: Any) -> None:
    assert tool_input(arguments) == value


@pytest.mark.parametrize("arguments", ["[1]", "{]", "1"])
def test_what_can_be_no_arguments_is_an_error(arguments: str) -> None:
    with pytest.raises(ServiceError):
        tool_input(arguments)
