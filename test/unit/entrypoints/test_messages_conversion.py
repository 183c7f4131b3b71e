"""Conversations in Anthropic's words: which chats they are, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError
from ramet.srt.entrypoints.anthropic.conversion import chat_of, in_our_words
from ramet.srt.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest
from ramet.srt.entrypoints.http.validation_words import describe_validation_errors
from ramet.srt.errors import RequestError

USER = {"role": "user", "content": "hi"}
WEATHER = {"name": "weather", "description": "It knows", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Ulm"}}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    """The chat of a request, without what it does not say."""
    body = MessagesRequest.model_validate({"max_tokens": 5, "messages": list(messages) or [USER], **fields})
    return chat_of(body).model_dump(exclude_none=True, exclude_defaults=True, by_alias=True)


def messages_of(*messages: Any, **fields: Any) -> list[dict[str, Any]]:
    return chat(*messages, **fields)["messages"]


def refusal(**fields: Any) -> str:
    """What is said of a request with these fields."""
    content = {"max_tokens": 5, "messages": [USER], **fields}
    try:
        chat_of(MessagesRequest.model_validate(content))
    except ValidationError as error:
        return describe_validation_errors(error.errors(), content)[0]
    except RequestError as error:
        return str(error)
    raise AssertionError("it was taken")


def test_what_is_sampled() -> None:
    assert chat(temperature=0.5, top_p=0.9, top_k=7, stop_sequences=["x"], stream=True, model="m") == {
        "model": "m",
        "messages": [USER],
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "stop": ["x"],
        "stream": True,
    }


def test_count_tokens_needs_no_max_tokens_and_takes_no_more_than_the_prompt() -> None:
    body = CountTokensRequest.model_validate({"messages": [USER], "tools": [WEATHER], "system": "s"})
    assert [message.role for message in chat_of(body).messages] == ["system", "user"]
    with pytest.raises(ValidationError):
        CountTokensRequest.model_validate({"messages": [USER], "max_tokens": 5})


@pytest.mark.parametrize(
    ("system", "content"),
    [
        ("be", "be"),
        ([{"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}}], "be"),
        (
            [{"type": "text", "text": "be"}, {"type": "text", "text": "so"}],
            [{"type": "text", "text": "be"}, {"type": "text", "text": "so"}],
        ),
    ],
)
def test_system(system: Any, content: Any) -> None:
    assert messages_of(USER, system=system) == [{"role": "system", "content": content}, USER]


@pytest.mark.parametrize("system", ["", [], None])
def test_no_system(system: Any) -> None:
    assert messages_of(USER, system=system) == [USER]


def test_neighbours_of_a_role_are_one_message() -> None:
    said = [
        USER,
        {"role": "user", "content": [{"type": "text", "text": "you"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "system", "content": "be quick"},
        USER,
    ]
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]
    assert messages_of(*said) == [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "yes"},
        {"role": "system", "content": "be quick"},
        USER,
    ]


def test_a_round_trip_with_tools() -> None:
    answer = [
        {"type": "thinking", "thinking": "let me", "signature": ""},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "text", "text": "I look", "citations": None},
        {**CALL, "caller": {"type": "direct"}},
        {**CALL, "id": "toolu_2"},
        {**CALL, "id": "toolu_3"},
    ]
    results = [
        {"type": "text", "text": "and?"},
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": [{"type": "text", "text": "sun"}]},
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "no net", "is_error": True},
        {"type": "tool_result", "tool_use_id": "toolu_3"},
    ]
    found = messages_of(USER, {"role": "assistant", "content": answer}, {"role": "user", "content": results})
    calls = [
        {"id": name, "type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
        for name in ("toolu_1", "toolu_2", "toolu_3")
    ]
    for call in found[1]["tool_calls"]:
        call.setdefault("type", "function")
    assert found == [
        USER,
        {"role": "assistant", "content": "I look", "reasoning_content": "let me", "tool_calls": calls},
        {"role": "tool", "content": "sun", "tool_call_id": "toolu_2", "name": "weather"},
        {"role": "tool", "content": "Error: no net", "tool_call_id": "toolu_1", "name": "weather"},
        {"role": "tool", "content": "", "tool_call_id": "toolu_3", "name": "weather"},
        {"role": "user", "content": "and?"},
    ]


def test_a_result_alone_makes_no_message_of_the_user() -> None:
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sun"}
    found = messages_of(USER, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [result]})
    assert [message["role"] for message in found] == ["user", "assistant", "tool"]


def test_a_whole_answer_may_be_sent_back() -> None:
    answer = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
        "stop_sequence": None, "content": [{"type": "text", "text": "yes", "parsed_output": {"a": 1}}],
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }  # fmt: skip
    assert messages_of(USER, answer, USER)[1] == {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("The answer is (", "The answer is ("),
        ([{"type": "text", "text": "The"}, {"type": "text", "text": "answer"}], "The\nanswer"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "The"}], "The"),
    ],
)
def test_the_assistants_last_message_is_continued(content: Any, text: str) -> None:
    found = chat(USER, {"role": "assistant", "content": content})
    assert found["continue_final_message"] is True
    assert found["messages"][-1]["content"] == text


@pytest.mark.parametrize("content", ["", []])
def test_an_empty_beginning_is_none(content: Any) -> None:
    found = chat(USER, {"role": "assistant", "content": content})
    assert found["messages"] == [USER] and "continue_final_message" not in found


def test_tools() -> None:
    found = chat(tools=[{**WEATHER, "type": "custom", "strict": True, "cache_control": {"type": "ephemeral"}}])
    function = {"name": "weather", "description": "It knows", "parameters": {"type": "object"}, "strict": True}
    assert found["tools"] == [{"type": "function", "function": function}]
    assert "tool_choice" not in found


@pytest.mark.parametrize(
    ("choice", "fields"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        (
            {"type": "tool", "name": "weather"},
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        ),
        (
            {"type": "any", "disable_parallel_tool_use": True},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
    ],
)
def test_tool_choice(choice: Any, fields: Any) -> None:
    found = chat(tools=[WEATHER], tool_choice=choice)
    assert {name: found[name] for name in ("tool_choice", "parallel_tool_calls") if name in found} == fields


@pytest.mark.parametrize(
    ("thinking", "thinks"),
    [
        ({"type": "enabled", "budget_tokens": 2048}, True),
        ({"type": "adaptive", "display": "summarized"}, True),
        ({"type": "disabled"}, False),
    ],
)
def test_thinking(thinking: Any, thinks: bool) -> None:
    assert chat(thinking=thinking)["chat_template_kwargs"] == {"enable_thinking": thinks, "thinking": thinks}
    assert "chat_template_kwargs" not in chat()


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_a_schema(name: str) -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    found = chat(**{name: {"format": form} if name == "output_config" else form})
    assert found["response_format"]["json_schema"] == {"name": "output", "schema": {"type": "object"}}


@pytest.mark.parametrize(("effort", "ours"), [("low", "low"), ("xhigh", "xhigh"), ("max", "xhigh")])
def test_effort(effort: str, ours: str) -> None:
    assert chat(output_config={"effort": effort})["reasoning_effort"] == ours


def test_what_says_nothing_is_taken() -> None:
    keep_all = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    plain = chat()
    assert plain == chat(
        metadata={"user_id": "u"}, service_tier="auto", cache_control={"type": "ephemeral"}, container=None,
        context_management=keep_all, speed="standard", tools=[], mcp_servers=[], output_config={},
    )  # fmt: skip


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}
SERVER_TOOL = {"type": "web_search_20250305", "name": "web_search", "max_uses": 2}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, ["messages[0].content[0].type", "'image'"]),
        ({"messages": [{"role": "user", "content": [CALL]}]}, ["messages[0].content[0].type", "'tool_use'"]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]}
                ]
            },
            ["messages[0].content[0].content[0].type", "'image'"],
        ),
        ({"messages": [USER, {"role": "assistant", "content": [CALL]}]}, ["messages", "toolu_1", "tool_result"]),
        ({"messages": [{"role": "tool", "content": "a"}]}, ["messages[0].role", "'tool'"]),
        ({"messages": [{"role": "assistant", "content": ""}]}, ["messages", "empty"]),
        ({"tools": [SERVER_TOOL]}, ["tools[0].type", "custom", "web_search_20250305"]),
        ({"tools": [{**WEATHER, "name": "no name"}]}, ["tools[0].name"]),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, ["tools[0].defer_loading", "not supported"]),
        ({"tool_choice": {"type": "required"}}, ["tool_choice.type", "auto, any", "'required'"]),
        ({"thinking": {"type": "between_tools"}}, ["thinking.type", "'between_tools'"]),
        ({"max_tokens": -1}, ["max_tokens", "at least 0"]),
        ({"max_tokens": None}, ["max_tokens"]),
        ({"stop_sequences": [""]}, ["stop_sequences[0]", "empty"]),
        ({"container": "c_1"}, ["container", "not supported"]),
        ({"context_management": {"edits": [{"type": "compact"}]}}, ["context_management", "not supported"]),
        ({"frequency_penalty": 1.0}, ["frequency_penalty", "unknown"]),
        (
            {
                "output_format": {"type": "json_schema", "schema": {}},
                "output_config": {"format": {"type": "json_schema", "schema": {}}},
            },
            ["output_format", "output_config.format"],
        ),
        ({"output_config": {"effort": "huge"}}, ["output_config.effort", "'huge'"]),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(fields: dict[str, Any], words: list[str]) -> None:
    said = refusal(**fields)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RequestError("response_format: it is too deep", param="response_format"), "output_config: it is too deep"),
        (RequestError("stop has too many", param="stop"), "stop_sequences has too many"),
        (RequestError("it is bad", param="chat_template_kwargs"), "thinking: it is bad"),
        (RequestError("tools: twice", param="tools"), "tools: twice"),
    ],
)
def test_errors_have_our_names(error: RequestError, words: str) -> None:
    assert str(in_our_words(error)) == words
