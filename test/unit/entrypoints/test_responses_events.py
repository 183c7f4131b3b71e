"""The events of a response's stream: for every way in which an output is cut, they add up to the same response."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ramet.srt.entrypoints.openai.responses_events import ResponseEvents
from ramet.srt.text.output_events import Content, Event, Reasoning, ToolCallArguments, ToolCallStart, merged
from ramet.srt.text.output_parser import OutputParser
from ramet.srt.text.reasoning.think_parser import ThinkMarks, ThinkParser
from ramet.srt.text.tool_calls.hermes import HermesParser
from ramet.srt.text.tool_calls.tool import Tool

USAGE = {"input_tokens": 1}
PIECE = st.text("ab \n\U0001f331", min_size=1, max_size=4)
PART = st.one_of(
    st.lists(PIECE, min_size=1, max_size=4).map(lambda texts: [Content(text) for text in texts]),
    st.lists(PIECE, min_size=1, max_size=4).map(lambda texts: [Reasoning(text) for text in texts]),
    st.lists(PIECE, max_size=4).map(lambda texts: [ToolCallStart(0, "call_0", "f")]
                                    + [ToolCallArguments(0, text) for text in texts]),
)  # fmt: skip


def told(parts: list[list[Event]]) -> list[Event]:
    """The events of an output, its calls numbered."""
    events: list[Event] = []
    num_calls = 0
    for event in (event for part in parts for event in part):
        if isinstance(event, ToolCallStart):
            event, num_calls = ToolCallStart(num_calls, f"call_{num_calls}", "f"), num_calls + 1
        elif isinstance(event, ToolCallArguments):
            event = ToolCallArguments(num_calls - 1, event.text)
        events.append(event)
    return events


def run(updates: list[list[Event]], reason: str = "stop", **options: Any) -> tuple[list[dict[str, Any]], Any]:
    events = ResponseEvents({"id": "resp_1", "object": "response"}, **options)
    stream = events.begin()
    for update in updates:
        stream += events.add(update)
    stream += events.end(reason, USAGE, 7)
    return stream, events.response


def without_ids(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**item, "id": item["id"].split("_")[0]} for item in output]


def check(stream: list[dict[str, Any]], response: dict[str, Any]) -> None:
    """What a client that adds up the deltas has is what the done events and the response have."""
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    assert [event["type"] for event in stream[:2]] == ["response.created", "response.in_progress"]
    assert stream[0]["response"]["status"] == "in_progress"
    assert stream[0]["response"]["output"] == []
    assert stream[-1]["type"] == f"response.{response['status']}"
    assert stream[-1]["response"] == response
    items: list[dict[str, Any]] = []
    texts: dict[str, str] = {}
    open_id = None
    for event in stream[2:-1]:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert open_id is None
            open_id = event["item"]["id"]
            assert event["item"]["status"] == "in_progress"
            assert event["output_index"] == len(items)
            texts[open_id] = ""
            continue
        assert event["output_index"] == len(items)
        assert event.get("item_id", open_id) == open_id
        if kind.endswith(".delta"):
            texts[open_id] += event["delta"]
        elif re.search(r"(text|arguments)\.done$", kind):
            assert texts[open_id] == event["arguments" if "arguments" in kind else "text"]
        elif kind == "response.content_part.done":
            assert event["part"]["text"] == texts[open_id]
        elif kind == "response.output_item.done":
            assert event["item"]["id"] == open_id
            items.append(event["item"])
            open_id = None
        else:
            assert kind == "response.content_part.added"
    assert open_id is None
    assert items == response["output"]


@given(st.lists(PART, max_size=5), st.randoms(), st.sampled_from(["stop", "tool_calls", "length"]), st.booleans())
def test_every_cut_gives_the_same_response(parts: Any, random: Any, reason: str, encodes: bool) -> None:
    whole = told(parts)
    cuts = sorted(random.randrange(len(whole) + 1) for _ in range(3))
    places = [0, *cuts, len(whole)]
    updates = [whole[begin:end] for begin, end in zip(places, places[1:], strict=False)]
    outputs = []
    for one in (updates, [whole], [[event] for event in whole]):
        stream, response = run(one, reason, encodes_reasoning=encodes)
        check(stream, response)
        outputs.append(without_ids(response["output"]))
    assert outputs[0] == outputs[1] == outputs[2]
    said = "".join(part["text"] for item in outputs[0] if item["type"] == "message" for part in item["content"])
    thought = "".join(part["text"] for item in outputs[0] if item["type"] == "reasoning" for part in item["content"])
    assert said == "".join(event.text for event in whole if isinstance(event, Content))
    assert thought == "".join(event.text for event in whole if isinstance(event, Reasoning))
    assert [item["call_id"] for item in outputs[0] if item["type"] == "function_call"] == [
        event.id for event in whole if isinstance(event, ToolCallStart)
    ]


def test_an_output_that_is_cut_off() -> None:
    _, response = run(
        [[Reasoning("hm"), Content("a")], [ToolCallStart(0, "c", "f"), ToolCallArguments(0, "{")]], "length"
    )
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None
    assert [item["status"] for item in response["output"]] == ["completed", "completed", "incomplete"]
    assert response["output"][2]["arguments"] == "{"
    _, response = run([[Reasoning("hm")]], "length")
    assert [item["type"] for item in response["output"]] == ["reasoning"]


def test_a_model_that_says_nothing_has_a_message_without_text() -> None:
    for told_before in ([], [Reasoning("hm")]):
        _, response = run([told_before])
        assert response["status"] == "completed"
        assert response["output"][-1]["content"][0]["text"] == ""
    _, response = run([[ToolCallStart(0, "c", "f"), ToolCallArguments(0, "{}")]], "tool_calls")
    assert [item["type"] for item in response["output"]] == ["function_call"]
    assert response["completed_at"] == 7
    assert response["usage"] == USAGE


def test_an_aborted_request_has_failed_with_what_it_had() -> None:
    stream, response = run([[Content("a")]], "abort")
    assert stream[-1]["type"] == "response.failed"
    assert response["error"] == {"code": "server_error", "message": "the request was aborted"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "a"


def test_a_failure_in_the_middle() -> None:
    events = ResponseEvents({"id": "resp_1"})
    stream = events.begin() + events.add([Content("a")])
    stream += events.fail_with(RuntimeError("inside"), "internal error")
    assert [event["type"] for event in stream[-2:]] == ["response.failed", "error"]
    assert stream[-1] == {
        "type": "error",
        "code": "server_error",
        "message": "internal error",
        "param": None,
        "sequence_number": len(stream) - 1,
    }
    assert stream[-2]["response"]["error"] == {"code": "server_error", "message": "internal error"}


def token(text: str) -> dict[str, Any]:
    return {"token": text, "bytes": list(text.encode()), "logprob": -1.0, "top_logprobs": []}


@pytest.mark.parametrize(
    ("updates", "shown"),
    [
        # all of a plain answer, those that come before their text and the one that ends it, too
        ([([], "a"), ([Content("ab")], "b"), ([], "</s>")], "a b </s>"),
        # reasoning, calls and their marks are not the message's
        ([([Reasoning("hm")], "hm"), ([], "</th"), ([], "ink>"), ([Content("a")], "a"), ([Content("b")], "b")], "a b"),
        ([([Content("a")], "a"), ([], "<call>"), ([ToolCallStart(0, "c", "f")], "{")], "a"),
        ([([ToolCallStart(0, "c", "f")], "{}"), ([], "</call>"), ([Content("b")], "b")], "b"),
    ],
)  # fmt: skip
def test_log_probabilities_are_those_of_the_message(updates: list[tuple[list[Event], str]], shown: str) -> None:
    events = ResponseEvents({"id": "resp_1"})
    stream = []
    for update, text in updates:
        stream += events.add(update, [token(text)])
    stream += events.end("stop", USAGE, 7)
    message = next(item for item in events.response["output"] if item["type"] == "message")
    logprobs = message["content"][0]["logprobs"]
    assert " ".join(one["token"] for one in logprobs) == shown
    deltas = [event for event in stream if event["type"] == "response.output_text.delta"]
    assert [one for event in deltas for one in event["logprobs"]] == logprobs
    done = next(event for event in stream if event["type"] == "response.output_text.done")
    assert done["logprobs"] == logprobs


def content_tokens(tokens: list[str], sizes: list[int]) -> list[list[str]]:
    """The tokens of each message of the output, which comes in groups of so many tokens."""
    parser = OutputParser([ThinkParser([ThinkMarks("<think>", "</think>")], False), HermesParser([Tool("f")])], None)
    events = ResponseEvents({"id": "resp_1"})
    left = list(tokens)
    for size in sizes + [1] * len(tokens):
        group, left = left[:size], left[size:]
        events.add(merged(parser.feed("".join(group))), [token(text) for text in group])
    events.add(merged(parser.finish()))
    events.end("stop", USAGE, 7)
    messages = [item["content"][0] for item in events.response["output"] if item["type"] == "message"]
    return [[one["token"] for one in message["logprobs"]] for message in messages]


@given(st.lists(st.integers(1, 6), max_size=8))
def test_log_probabilities_do_not_depend_on_how_many_tokens_come_at_once(sizes: list[int]) -> None:
    call = ["<tool_call>", '{"name": "f",', ' "arguments": ', '{"a": "look"}', "}", "</tool_call>"]
    tokens = ["<think>", "h", "m", "</think>", "I", " look", " <", " b", ".", *call, "I", " look", "</s>"]
    said = [["I", " look", " <", " b", "."], ["I", " look", "</s>"]]
    assert content_tokens(tokens, sizes) == said


def test_log_probabilities_of_text_that_is_not_that_of_its_tokens() -> None:
    events = ResponseEvents({"id": "resp_1"})
    broken = {**token("?"), "bytes": [0xF0]}
    events.add([Content("a\ufffdb")], [token("a"), broken, token("b")])
    events.add([Content("c")], [token("c")])
    events.end("stop", USAGE, 7)
    logprobs = events.response["output"][0]["content"][0]["logprobs"]
    assert [one["token"] for one in logprobs] == ["a", "?", "b", "c"]


def test_a_call_that_a_stop_string_cuts_off_is_incomplete() -> None:
    for reason, status in (("stop", "incomplete"), ("tool_calls", "completed")):
        stream, response = run([[ToolCallStart(0, "c", "f"), ToolCallArguments(0, '{"a": ')]], reason)
        assert [item["status"] for item in response["output"]] == [status]
        assert response["status"] == "completed"
        done = next(event for event in stream if event["type"] == "response.output_item.done")
        assert done["item"]["status"] == status
