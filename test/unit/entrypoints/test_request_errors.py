"""What a body that can't be used is told: the parameter, the place in it, and what is wrong there."""

from typing import Any

import pytest
from pydantic import ValidationError
from ramet.srt.entrypoints.generate_request import GenerateReqInput
from ramet.srt.entrypoints.http.http_validation import RequestBody
from ramet.srt.entrypoints.http.validation_words import describe_validation_errors
from ramet.srt.entrypoints.openai.pooling_protocol import EncodeReqInput
from ramet.srt.entrypoints.openai.protocol import TOOL_NAME, ChatCompletionRequest, CompletionRequest
from ramet.srt.entrypoints.routes.admin import StartProfileBody
from ramet.srt.errors import RequestError

MESSAGES = [{"role": "user", "content": "a"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def error_of(request: Any, **body: Any) -> tuple[str, str | None, str | None]:
    content = {"model": "m"} | body
    with pytest.raises(ValidationError) as caught:
        request.model_validate(content)
    return describe_validation_errors(caught.value.errors(), content, request.foreign)


@pytest.mark.parametrize("prompt", [["a"] * 4097, [[1]] * 4097])
def test_too_many_prompts_are_called_that(prompt) -> None:
    message, param, code = error_of(CompletionRequest, prompt=prompt)
    assert message == "prompt must have at most 4096 entries, not 4097" and (param, code) == ("prompt", None)


def test_a_wrong_type_is_called_that() -> None:
    assert error_of(CompletionRequest, prompt=5) == ("prompt must be a string or a list, not 5", "prompt", None)


def test_a_part_that_is_no_text_is_pointed_at() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]
    message, param, _ = error_of(ChatCompletionRequest, messages=messages)
    assert message == "messages[0].content[1].type must be text, not 'image_url'" and param == "messages"


@pytest.mark.parametrize("name", ["lora_path", "functions"])
def test_what_is_not_supported_is_named(name: str) -> None:
    message, param, code = error_of(ChatCompletionRequest, messages=MESSAGES, **{name: [{"type": "function"}]})
    assert message.startswith(f"{name} is not supported")
    assert (param, code) == (name, "unsupported_parameter")


def test_what_clients_say_about_themselves_is_taken() -> None:
    own = {"user": "u", "metadata": {"a": "b"}, "store": True, "tools": [], "service_tier": "flex", "unheard_of": None}
    bare = {"model": "m", "messages": MESSAGES}
    assert ChatCompletionRequest.model_validate(bare | own) == ChatCompletionRequest.model_validate(
        bare | {"tools": []}
    )


TOOL_WITHOUT_ID = [{"role": "tool", "content": "x"}]


@pytest.mark.parametrize(
    ("request_type", "body", "message"),
    [
        ("chat", {"messages": [{"role": "usr", "content": "a"}]},
         "messages[0].role must be one of system, developer, user, assistant, tool, not 'usr'"),
        ("chat", {"messages": [MESSAGES[0], {"content": "a"}]}, "messages[1].role must be given"),
        ("chat", {"messages": ["hello"]}, "messages[0] must be an object, not 'hello'"),
        ("chat", {"messages": "hello"}, "messages must be a list, not 'hello'"),
        ("chat", {}, "messages must be given"),
        ("chat", {"messages": []}, "messages must not be empty"),
        ("chat", {"messages": TOOL_WITHOUT_ID}, "messages[0].tool_call_id must be given"),
        ("chat", {"messages": [{"role": "user", "content": 5}]},
         "messages[0].content must be a string or a list, not 5"),
        ("chat", {"messages": [{"role": "assistant", "tool_calls": []}]},
         "messages[0]: an assistant's message needs a content or tool_calls"),
        ("chat", {"messages": [MESSAGES[0] | {"weight": 1}]}, "messages[0].weight is unknown or not supported"),
        ("chat", {"messages": [MESSAGES[0] | {"function_call": "auto"}]},
         "messages[0].function_call is not supported (a call, by an older name): it may be null"),
        ("chat", {"messages": MESSAGES, "function_call": {"name": "f"}},
         'function_call is not supported (tools, by an older name): it may be null or "none" or "auto"'),
        ("chat", {"messages": MESSAGES, "temperature": 3}, "temperature must be at most 2.0, not 3"),
        ("chat", {"messages": MESSAGES, "n": 0}, "n must be at least 1, not 0"),
        ("chat", {"messages": MESSAGES, "stop": 5}, "stop must be a string or a list, not 5"),
        ("chat", {"messages": MESSAGES, "response_format": {"type": "grammar"}},
         "response_format.type must be one of text, json_object, json_schema, not 'grammar'"),
        ("chat", {"messages": MESSAGES, "reasoning_effort": "huge"},
         "reasoning_effort must be one of none, minimal, low, medium, high, xhigh, not 'huge'"),
        ("completion", {"prompt": [1, "a"]}, "prompt[1] must be an integer, not 'a'"),
        ("completion", {"prompt": "a", "best_of": 2},
         "best_of is not supported (the best of several outputs): it may be null or 1"),
        ("completion", {"prompt": "a", "best_of": True},
         "best_of is not supported (the best of several outputs): it may be null or 1"),
        ("completion", {"prompt": "a", "unheard_of": 0}, "unheard_of is unknown or not supported"),
        ("chat", {"messages": MESSAGES, "prompt": "a"}, "prompt is unknown or not supported"),
        ("completion", {"prompt": "\ud800"}, "prompt holds a lone surrogate, which is no text"),
        ("chat", {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "a b"}}]},
         f"tools[0].function.name must match {TOOL_NAME}, not 'a b'"),
        ("completion", {"prompt": "a", "seed": 2**63}, f"seed must be at most {2**63 - 1}, not {2**63}"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_words_of_the_api(request_type: str, body: dict[str, Any], message: str) -> None:
    request = {"chat": ChatCompletionRequest, "completion": CompletionRequest}[request_type]
    assert error_of(request, **body)[0] == message


def test_an_assistant_that_said_nothing_did_so() -> None:
    for content, calls in ((None, []), ([], None), ("", None)):
        message = {"role": "assistant", "content": content, "tool_calls": calls}
        request = ChatCompletionRequest.model_validate({"messages": [*MESSAGES, message]})
        assert request.messages[1].content == ""
    calls = [{"function": {"name": "f"}}]
    message = {"role": "assistant", "content": [], "tool_calls": calls}
    assert ChatCompletionRequest.model_validate({"messages": [*MESSAGES, message]}).messages[1].content is None


@pytest.mark.parametrize("bias", [{"7": 1, "abc": 1}, {"7": 1, "abc": "x"}, {"abc": 101}])
def test_a_wrong_bias_is_called_by_its_key(bias: dict[str, Any]) -> None:
    message, param, _ = error_of(ChatCompletionRequest, messages=MESSAGES, logit_bias=bias)
    assert message.startswith("logit_bias['abc']") and param == "logit_bias"


def test_a_wrong_entry_of_a_list_is_called_by_its_place() -> None:
    assert (
        error_of(StartProfileBody, activities=["CPU", "TPU"])[0] == "activities[1] must be one of CPU, GPU, not 'TPU'"
    )


@pytest.mark.parametrize("request_type", [GenerateReqInput, EncodeReqInput, ChatCompletionRequest])
def test_a_request_id_is_a_text_or_nothing(request_type: type[RequestBody]) -> None:
    prompt: dict[str, Any] = {"messages": MESSAGES} if request_type is ChatCompletionRequest else {"text": "a"}
    assert request_type.make(rid="", **prompt).rid == ""
    for rid, words in (("\ud800", "lone surrogate"), ("a" * 257, "at most 256")):
        with pytest.raises(RequestError, match=words) as caught:
            request_type.make(rid=rid, **prompt)
        assert caught.value.param == "rid"
