"""OpenAI's routes over real HTTP, by the published client, with the fake scheduler behind them."""

from typing import Any

import httpx
import openai
import pytest
from http_answers import repeated
from ramet.srt.text.tokenizer import Tokenizer
from server_process import MODEL_NAME

CONTEXT_LEN = 256


def test_completion(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model=MODEL_NAME, prompt="grow a clone", max_tokens=6)
    assert answer.choices[0].text == repeated(tokenizer, "grow a clone", 6)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == 6 + len(tokenizer.encode("grow a clone"))
    assert len(client.completions.create(model=MODEL_NAME, prompt=[10] * 5).choices[0].text) > 0
    answer = client.completions.create(model=MODEL_NAME, prompt=[[10], [11, 12]], max_tokens=2, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == 8


def test_completion_echo_and_logprobs(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    choice = client.completions.create(model=MODEL_NAME, prompt="grow a", max_tokens=3, echo=True, logprobs=2).choices[
        0
    ]
    num_prompt = len(tokenizer.encode("grow a"))
    assert choice.text == "grow a" + repeated(tokenizer, "grow a", 3)
    assert choice.logprobs.token_logprobs == [None] + [-0.5] * (num_prompt + 2)
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
    assert choice.logprobs.top_logprobs[0] is None
    assert len(choice.logprobs.top_logprobs[1]) == 3, "the two likeliest, and the token itself"


@pytest.mark.parametrize("echo", [False, True])
def test_completion_stream(client: openai.OpenAI, tokenizer: Tokenizer, echo: bool) -> None:
    stream = client.completions.create(
        model=MODEL_NAME,
        prompt=["grow a", "b"],
        max_tokens=7,
        n=2,
        echo=echo,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, reasons, usage = {}, {}, None
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
        usage = chunk.usage
    front = ["grow a", "grow a", "b", "b"] if echo else [""] * 4
    backs = [repeated(tokenizer, "grow a", 7)] * 2 + [repeated(tokenizer, "b", 7)] * 2
    assert [texts[index] for index in range(4)] == [one + two for one, two in zip(front, backs, strict=True)]
    assert set(reasons.values()) == {"length"}
    assert usage.completion_tokens == 28
    assert usage.prompt_tokens == len(tokenizer.encode("grow a")) + 1


def chat_prompt(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_chat(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=messages, max_tokens=4, n=2, logprobs=True, top_logprobs=2, seed=1
    )
    prompt_ids = tokenizer.encode(chat_prompt("hello"), add_special_tokens=False)
    assert answer.usage.prompt_tokens == len(prompt_ids)
    assert len(answer.choices) == 2
    choice = answer.choices[1]
    assert choice.message.role == "assistant"
    assert choice.message.content == tokenizer.decode(prompt_ids[:4], skip_special_tokens=True)
    assert [len(one.top_logprobs) for one in choice.logprobs.content] == [2] * 4
    assert bytes(choice.logprobs.content[1].bytes).decode() == choice.logprobs.content[1].token
    again = client.chat.completions.create(
        model=MODEL_NAME, messages=[*messages, choice.message, {"role": "user", "content": "more"}], max_tokens=1
    )
    assert again.choices[0].finish_reason == "length"
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": parts}], max_tokens=1
    )
    assert answer.usage.prompt_tokens == len(tokenizer.encode(chat_prompt("hel\nlo"), add_special_tokens=False))


def test_chat_stream(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": "hello 植物"}],
        max_completion_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
    )
    chunks = list(stream)
    prompt_ids = tokenizer.encode(chat_prompt("hello 植物"), add_special_tokens=False)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == tokenizer.decode(
        prompt_ids[:9], skip_special_tokens=True
    )
    logprobs = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices and chunk.choices[0].logprobs]
    assert sum(len(one.content) for one in logprobs) == 9
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 9
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_stop_never_leaks(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": "the quick brown fox"}],
        max_tokens=40,
        stop=["brown", "jumps"],
        stream=True,
    )
    text, reason = "", None
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason
        assert "b" not in text
    assert text == "user\nthe quick "
    assert reason == "stop"


def test_default_chat_length_is_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": "hi"}], extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == CONTEXT_LEN


@pytest.mark.parametrize(
    ("extra", "param", "code"),
    [
        ({"tools": [{"type": "function"}]}, "tools", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", None),  # how this model would call it
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"temperature": 3}, "temperature", None),
        ({"n": 0}, "n", None),
        ({"max_tokens": -1}, "max_tokens", None),
        ({"max_tokens": CONTEXT_LEN}, "max_tokens", "context_length_exceeded"),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"min_tokens": 9, "max_tokens": 2}, "min_tokens", None),
        ({"logit_bias": {"9999": 1}}, "logit_bias", None),
        ({"response_format": {"type": "grammar"}}, "response_format", None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 3}}}},
         "response_format", None),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", None),
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", None),
        ({"messages": [{"role": "user"}]}, "messages", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", None),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "weight", "unsupported_parameter"),
    ],
)  # fmt: skip
def test_chat_refuses_by_name(http: httpx.Client, extra: dict[str, Any], param: str | None, code: str | None) -> None:
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "a"}], **extra}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    if param is not None:
        assert error["param"] == param
        assert param in error["message"]
    assert error["code"] == code


@pytest.mark.parametrize("name", ["suffix", "best_of"])
def test_completion_refuses_what_is_not_supported(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL_NAME, prompt="a", extra_body={name: 2})
    assert caught.value.param == name
    assert caught.value.code == "unsupported_parameter"


def test_models(client: openai.OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="a")
    assert caught.value.code == "model_not_found"


def chat(http: httpx.Client, messages: list[dict[str, Any]], **options: Any) -> httpx.Response:
    body = {"model": MODEL_NAME, "messages": messages, "max_tokens": 1, **options}
    return http.post("/v1/chat/completions", json=body)


def test_calls_in_the_history_are_taken(http: httpx.Client) -> None:
    function = {"name": "grow", "arguments": '{"cm": 3}'}
    call = {"id": "c1", "type": "function", "function": function}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "grow"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    assert chat(http, messages).status_code == 200
    for name in ("reasoning_content", "reasoning"):
        assert chat(http, [*messages, {"role": "assistant", "content": "a", name: "b"}]).status_code == 200
    function["arguments"] = "[3]"
    refused = chat(http, messages)
    assert refused.status_code == 400
    assert "must be a JSON object" in refused.json()["error"]["message"]
    messages[1] = {"role": "assistant"}
    assert chat(http, messages).status_code == 400


def test_the_final_message_is_continued(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "plants"}]
    lengths = [
        chat(http, messages, continue_final_message=continues).json()["usage"]["prompt_tokens"]
        for continues in (False, True)
    ]
    assert lengths[1] < lengths[0], "neither the end of the message nor a new one's beginning"
