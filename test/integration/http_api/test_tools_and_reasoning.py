"""Tools and reasoning over real HTTP, by the published client.

The fake scheduler repeats the prompt, and the template is the message alone: so the message says what the model writes.
Whether a model can be made to call a function a real one shows.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from ramet.srt.text.tokenizer import Tokenizer
from server_process import MODEL_NAME, ServerProcess, write_weightless_model

DEMO_MODEL = Path(__file__).resolve().parents[3] / "examples" / "demo_model"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Lima"]}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
PING = {"type": "function", "function": {"name": "ping"}}
TOOLS = [WEATHER, PING]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
PINGED = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>\nThey ask for the weather.\n</think>\n\n"
# Names the tools, and shows what a model was told about them and what it has called.
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weightless_model(tmp_path_factory.mktemp("model"), 2048)


@pytest.fixture(scope="module")
def echo(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Echo"]:
    folder = tmp_path_factory.mktemp("echo")
    (folder / "template.jinja").write_text("{{ messages[-1].content }}")
    flags = ["--chat-template", str(folder / "template.jinja"), "--tool-call-parser", "hermes"]
    with ServerProcess(model, folder / "log", *flags, "--reasoning-parser", "qwen3") as server:
        yield Echo(server.wait_ready(), Tokenizer.from_path(str(model)))


class Echo:
    """A model that writes what it is told to."""

    def __init__(self, server: ServerProcess, tokenizer: Tokenizer):
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        self._tokenizer = tokenizer

    def chat(self, output: str, **fields: Any) -> Any:
        num_tokens = len(self._tokenizer.encode(output, add_special_tokens=False))
        fields.setdefault("tools", TOOLS)
        return self.client.chat.completions.create(
            model=MODEL_NAME, messages=[{"role": "user", "content": output}], max_tokens=num_tokens, **fields
        )

    def streamed(self, output: str, **fields: Any) -> tuple[dict[str, Any], Any]:
        """The message that a stream's deltas make, and what it ended with."""
        message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
        reason = None
        for chunk in self.chat(output, stream=True, **fields):
            (choice,) = chunk.choices
            delta = choice.delta
            message["content"] += delta.content or ""
            message["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or []:
                if call.id is not None:
                    assert call.index == len(message["tool_calls"]) and call.type == "function"
                    message["tool_calls"].append([call.function.name, ""])
                message["tool_calls"][call.index][1] += call.function.arguments or ""
            reason = choice.finish_reason or reason
        return message, reason


def calls_of(message: Any) -> list[list[str]]:
    return [[call.function.name, call.function.arguments] for call in message.tool_calls or []]


def test_reasoning_content_and_calls_are_told_apart(echo: Echo) -> None:
    output = f"{THOUGHT}I look. {CALL}\n{PINGED}"
    answer = echo.chat(output)
    (choice,) = answer.choices
    assert choice.message.reasoning_content.strip() == "They ask for the weather."
    assert choice.message.content.strip() == "I look."
    calls = calls_of(choice.message)
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("get_weather", {"city": "Oslo", "days": 2}), ("ping", {})
    ]  # fmt: skip
    assert len({call.id for call in choice.message.tool_calls}) == 2
    message, _ = echo.streamed(output)
    assert message["tool_calls"] == calls
    assert message["content"] == choice.message.content
    assert message["reasoning_content"] == choice.message.reasoning_content
    assert 3 < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens


def test_a_message_of_calls_alone_has_no_content(echo: Echo) -> None:
    message = echo.chat(CALL).choices[0].message
    assert message.content is None and len(message.tool_calls) == 1
    assert "reasoning_content" not in message.model_dump()


def test_options_of_reasoning(echo: Echo) -> None:
    output = f"{THOUGHT}Hello."
    kept = echo.chat(output, extra_body={"separate_reasoning": False}).choices[0].message
    assert kept.content == output and "reasoning_content" not in kept.model_dump()
    left_out = echo.chat(output, extra_body={"include_reasoning": False}).choices[0].message
    assert left_out.content.strip() == "Hello." and "reasoning_content" not in left_out.model_dump()
    pieces = [
        getattr(chunk.choices[0].delta, "reasoning_content", None)
        for chunk in echo.chat(output, stream=True, extra_body={"stream_reasoning": False})
    ]
    assert [piece.strip() for piece in pieces if piece] == ["They ask for the weather."]


def test_without_tools_a_call_is_content(echo: Echo) -> None:
    for fields in ({"tools": []}, {"tool_choice": "none"}, {"tools": [PING]}):
        message = echo.chat(CALL, **fields).choices[0].message
        assert message.content == CALL and not message.tool_calls, fields


def test_a_stop_string_in_a_call_cuts_it_off(echo: Echo) -> None:
    (choice,) = echo.chat(CALL, stop=["Oslo"]).choices
    assert calls_of(choice.message) == [["get_weather", '{"city": "']]
    assert choice.finish_reason == "stop"
    assert echo.streamed(CALL, stop=["Oslo"])[1] == "stop"


def test_one_call_where_they_may_not_be_parallel(echo: Echo) -> None:
    message = echo.chat(CALL + PINGED, parallel_tool_calls=False).choices[0].message
    assert [name for name, _ in calls_of(message)] == ["get_weather"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required", "tools": None}, "tool_choice: there are no tools to choose from"),
        ({"tool_choice": {"type": "function", "function": {"name": "pong"}}}, "no tool of the name 'pong'"),
        ({"tools": [PING, PING]}, "tools: there are two of the name 'ping'"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "must be a schema of the type",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(echo: Echo, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        echo.chat("x", **fields)


# ---- a model that can be made to ----


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "template.jinja").write_text(TEMPLATE)
    flags = ["--chat-template", str(folder / "template.jinja"), "--tool-call-parser", "hermes"]
    with ServerProcess(DEMO_MODEL, folder / "log", *flags, "--device", "cpu", fake=False) as server:
        server.wait_ready()
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    fields.setdefault("messages", [{"role": "user", "content": "How is the weather?"}])
    return client.chat.completions.create(model=MODEL_NAME, temperature=0, max_tokens=400, **fields)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"]
)
def test_a_call_that_must_come_comes_and_fits_its_schema(demo: openai.OpenAI, choice: Any) -> None:
    tools = [WEATHER] if choice == "required" else TOOLS
    answer = ask(demo, tools=tools, tool_choice=choice, parallel_tool_calls=False).choices[0]
    (call,) = answer.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert set(arguments) == {"city", "days"} and arguments["city"] in ("Oslo", "Lima") and 1 <= arguments["days"] <= 3
    assert answer.finish_reason == "tool_calls"


def test_an_answer_may_have_a_form_where_calls_may_come(demo: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema | {"additionalProperties": False}}}
    message = ask(demo, tools=TOOLS, response_format=wanted).choices[0].message
    if not message.tool_calls:
        assert list(json.loads(message.content)) == ["ok"]
    assert json.loads(ask(demo, response_format=wanted).choices[0].message.content)["ok"] in (True, False)


def test_a_conversation_with_calls_goes_into_the_template(demo: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
    ]
    url = str(demo.base_url).removesuffix("v1/")
    tokens = httpx.post(url + "tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
    text = httpx.post(url + "detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text.endswith(
        'get_weather ping user: Weather? assistant: get_weather{"city": "Oslo"} tool: Rain. assistant: '
    )
    assert ask(demo, messages=messages, tools=TOOLS).choices[0].message is not None
