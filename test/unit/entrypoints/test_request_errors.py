"""What a body that can't be used is told: the parameter, the place in it, and what is wrong there."""

from typing import Any

import pytest
from pydantic import ValidationError
from ramet.srt.entrypoints.http.http_validation import describe_validation_errors
from ramet.srt.entrypoints.http_api import StartProfileBody
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest

MESSAGES = [{"role": "user", "content": "a"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def error_of(request: Any, **body: Any) -> tuple[str, str | None, str | None]:
    with pytest.raises(ValidationError) as caught:
        request.model_validate({"model": "m"} | body)
    return describe_validation_errors(caught.value.errors())


@pytest.mark.parametrize("prompt", [["a"] * 4097, [[1]] * 4097])
def test_too_many_prompts_are_called_that(prompt) -> None:
    message, param, code = error_of(CompletionRequest, prompt=prompt)
    assert "at most 4096 items" in message and "not 4097" in message and (param, code) == ("prompt", None)


def test_a_wrong_type_is_called_that() -> None:
    assert error_of(CompletionRequest, prompt=5) == ("prompt: Input should be a valid string", "prompt", None)


def test_a_part_that_is_no_text_is_pointed_at() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]
    message, param, _ = error_of(ChatCompletionRequest, messages=messages)
    assert message == "messages[0][1].type: Input should be 'text'" and param == "messages"


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_what_is_not_supported_is_named(name: str) -> None:
    message, param, code = error_of(ChatCompletionRequest, messages=MESSAGES, **{name: [{"type": "function"}]})
    assert message == f"unknown or unsupported parameter '{name}'"
    assert (param, code) == (name, "unsupported_parameter")


def test_what_clients_say_about_themselves_is_taken() -> None:
    own = {"user": "u", "metadata": {"a": "b"}, "store": False, "tools": []}
    assert ChatCompletionRequest.model_validate({"model": "m", "messages": MESSAGES} | own).tools == []
    assert error_of(ChatCompletionRequest, messages=MESSAGES, store=True)[1] == "store"


@pytest.mark.parametrize("bias", [{"7": 1, "abc": 1}, {"7": 1, "abc": "x"}, {"abc": 101}])
def test_a_wrong_bias_is_called_by_its_key(bias: dict[str, Any]) -> None:
    message, param, _ = error_of(ChatCompletionRequest, messages=MESSAGES, logit_bias=bias)
    assert message.startswith("logit_bias['abc']: ") and param == "logit_bias"


def test_a_wrong_entry_of_a_list_is_called_by_its_place() -> None:
    assert error_of(StartProfileBody, activities=["CPU", "TPU"])[0].startswith("activities[1]: ")
