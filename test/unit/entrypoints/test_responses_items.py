"""Items of responses: completed as they are remembered, and as the messages of a chat."""

from typing import Any

import pytest
from pydantic import TypeAdapter
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest
from ramet.srt.entrypoints.openai.responses_chat import chat_body
from ramet.srt.entrypoints.openai.responses_items import chat_messages, complete_item, encode_reasoning, reasoning_text
from ramet.srt.entrypoints.openai.responses_protocol import InputItem, InputTokensRequest, ResponsesRequest
from ramet.srt.errors import RequestError

ITEM: TypeAdapter[Any] = TypeAdapter(InputItem)
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
ANSWER = {"type": "function_call_output", "call_id": "c1", "output": "four"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL_MESSAGE = {"role": "tool", "tool_call_id": "c1", "content": "four"}


def said(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def messages_of(*items: dict[str, Any], instructions: str | None = None) -> list[dict[str, Any]]:
    return chat_messages([complete_item(ITEM.validate_python(item)) for item in items], instructions)


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([{"role": "user", "content": "hi"}], [{"role": "user", "content": "hi"}]),
        (
            [{"role": "developer", "content": [{"type": "input_text", "text": "a"}]}],
            [{"role": "developer", "content": "a"}],
        ),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        ),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}],
            [{"role": "assistant", "content": "no"}],
        ),
        # one turn is one message
        (
            [THOUGHT, said("I look."), CALL, ANSWER, THOUGHT, said("Four.")],
            [
                {"role": "assistant", "reasoning_content": "hm", "content": "I look.", "tool_calls": [TOOL_CALL]},
                TOOL_MESSAGE,
                {"role": "assistant", "reasoning_content": "hm", "content": "Four."},
            ],
        ),
        (
            [CALL, {**CALL, "call_id": "c2"}, ANSWER, {**ANSWER, "call_id": "c2"}],
            [
                {"role": "assistant", "tool_calls": [TOOL_CALL, {**TOOL_CALL, "id": "c2"}]},
                TOOL_MESSAGE,
                {**TOOL_MESSAGE, "tool_call_id": "c2"},
            ],
        ),
        # what is said behind a call is of its turn, but two messages are two
        (
            [said("a"), CALL, said("b"), ANSWER],
            [
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    "tool_calls": [TOOL_CALL],
                },
                TOOL_MESSAGE,
            ],
        ),
        ([said("a"), said("b")], [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]),
        (
            [said("a"), THOUGHT, said("b")],
            [
                {"role": "assistant", "content": "a"},
                {"role": "assistant", "reasoning_content": "hm", "content": "b"},
            ],
        ),
        # a turn that was cut off while the model thought
        (
            [THOUGHT, {"role": "user", "content": "go on"}],
            [{"role": "assistant", "reasoning_content": "hm", "content": ""}, {"role": "user", "content": "go on"}],
        ),
    ],
)  # fmt: skip
def test_items_become_messages(items: list[dict[str, Any]], messages: list[dict[str, Any]]) -> None:
    assert messages_of(*items) == messages
    ChatCompletionRequest.model_validate({"messages": messages})


def test_instructions_come_first() -> None:
    messages = messages_of({"role": "user", "content": "hi"}, instructions="Be brief.")
    assert messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def test_an_output_of_parts() -> None:
    parts = [{"type": "input_text", "text": "four"}]
    assert messages_of(CALL, {**ANSWER, "output": parts})[1] == TOOL_MESSAGE


def test_an_answer_to_no_call_is_refused() -> None:
    with pytest.raises(RequestError, match="call_id 'c1'") as caught:
        messages_of(ANSWER)
    assert caught.value.param == "input"


def test_reasoning_comes_back_in_each_of_its_forms() -> None:
    text = "hm, \U0001f331"
    summary = [{"type": "summary_text", "text": "one"}, {"type": "summary_text", "text": "two"}]
    assert reasoning_text({"content": [{"type": "reasoning_text", "text": text}], "encrypted_content": "other"}) == text
    assert reasoning_text({"summary": summary, "encrypted_content": encode_reasoning(text)}) == text
    assert reasoning_text({"summary": summary, "encrypted_content": None}) == "one\n\ntwo"
    for foreign in ("gAAAAAB", "ramet:%", "ramet:/w=="):
        with pytest.raises(RequestError, match="encrypted_content"):
            reasoning_text({"summary": [], "encrypted_content": foreign})


def test_items_are_completed() -> None:
    item = complete_item(ITEM.validate_python({"role": "assistant", "content": "a", "phase": "final_answer"}))
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "a", "annotations": []}],
        "status": "completed",
    }
    assert complete_item(ITEM.validate_python(THOUGHT)) == THOUGHT
    assert complete_item(ITEM.validate_python({**CALL, "id": "fc_1"})) == {**CALL, "id": "fc_1", "status": "completed"}


def test_a_body_becomes_a_chat() -> None:
    body = ResponsesRequest.model_validate(
        {
            "input": "hi",
            "instructions": "Be brief.",
            "max_output_tokens": 7,
            "temperature": 0.5,
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 2,
            "reasoning": {"effort": "low", "summary": "auto"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
            "tools": [
                {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True},
                {"type": "function", "name": "g"},
            ],
            "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
            "parallel_tool_calls": False,
        }
    )
    chat = chat_body(body, [complete_item(ITEM.validate_python({"role": "user", "content": "hi"}))])
    assert chat.model_dump(exclude_unset=True, by_alias=True) == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "reasoning_effort": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
        },
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}},
        ],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }


def test_a_named_tool_and_one_that_is_not_there() -> None:
    tools = [{"type": "function", "name": "f"}]
    item = complete_item(ITEM.validate_python({"role": "user", "content": "hi"}))
    body = InputTokensRequest.model_validate({"tools": tools, "tool_choice": {"type": "function", "name": "f"}})
    assert chat_body(body, [item]).model_dump(exclude_unset=True)["tool_choice"]["function"]["name"] == "f"
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}
    with pytest.raises(RequestError, match="'g'") as caught:
        chat_body(InputTokensRequest.model_validate({"tools": tools, "tool_choice": allowed}), [item])
    assert caught.value.param == "tool_choice"


def test_errors_of_the_chat_are_told_in_words_of_the_response() -> None:
    items = [complete_item(ITEM.validate_python({"role": "user", "content": "hi"}))] * 5000
    with pytest.raises(RequestError, match="^input must have at most 4096 entries") as caught:
        chat_body(InputTokensRequest.model_validate({}), items)
    assert caught.value.param == "input"
