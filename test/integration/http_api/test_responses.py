"""The Responses API over real HTTP, by the published client, with the fake scheduler behind it.

The chat template is the last message, and the fake scheduler repeats its prompt: the model says what it is told to say.
Told to "show", it says what the template was given.
"""

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel
from ramet.srt.entrypoints.openai.responses_answers import DeletedResponse, InputItems, InputTokens, ResponseObject
from server_process import MODEL_NAME, ServerProcess, wait_until, write_weightless_model

CONTEXT_LEN = 2048
TEMPLATE = """{#- <think> </think> <tool_call>{"name": "NAME", "arguments": "OBJECT"}</tool_call> -#}
{%- if messages[-1].content == 'show' %}{{ {'messages': messages, 'tools': tools or []} | tojson }}
{%- else %}{{ messages[-1].content }}{% endif %}</s>"""
CALL = '<think>hm</think>I look.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
TOOL: Any = {
    "type": "function",
    "name": "f",
    "description": "a function",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "strict": True,
}
FUNCTION = {key: TOOL[key] for key in ("name", "description", "parameters", "strict")}


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("parrot")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    model = write_weightless_model(folder / "model", CONTEXT_LEN)
    with ServerProcess(model, folder / "server.log", "--chat-template", str(template), FAKE_STEP_S="0.002") as process:
        yield process.wait_ready()
    assert "Traceback" not in process.output


@pytest.fixture
def client(parrot: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{parrot.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def http(parrot: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=parrot.url, timeout=30) as one:
        yield one


def create(http: httpx.Client, **body: Any) -> Any:
    response = http.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    ResponseObject.model_validate_json(response.text)
    return response.json()


def stream(http: httpx.Client, **body: Any) -> list[Any]:
    """The events of a stream, which are called by their types and end with the last of them."""
    with http.stream("POST", "/v1/responses", json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(response.iter_text()).split("\n\n")
    assert blocks.pop() == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def shown(answer: Any) -> Any:
    """What the template was given."""
    (message,) = answer["output"]
    return json.loads(message["content"][0]["text"])


# ---- answers ----


def test_an_answer_says_what_was_used(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL_NAME,
        input="Hello",
        instructions="Be brief.",
        max_output_tokens=100,
        temperature=0.5,
        metadata={"a": "b"},
        user="me",
        reasoning={"effort": "low", "summary": "auto"},
        text={"verbosity": "low"},
        service_tier="auto",
        truncation="disabled",
        background=False,
        prompt_cache_key="k",
    )
    assert answer.output_text == "Hello"
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert answer.id.startswith("resp_")
    assert answer.output[0].id.startswith("msg_")
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.5, 1.0, 100)
    assert (answer.instructions, answer.metadata, answer.user) == (
        "Be brief.",
        {"a": "b", "weight_version": "default"},
        "me",
    )
    assert (answer.reasoning.effort, answer.text.format.type, answer.tool_choice) == ("low", "text", "auto")
    usage = answer.usage
    assert usage.input_tokens == usage.output_tokens > 0
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert (usage.input_tokens_details.cached_tokens, usage.output_tokens_details.reasoning_tokens) == (0, 0)
    counted = {"model": MODEL_NAME, "input": "Hello", "instructions": "Be brief."}
    count: Any = client.post("/responses/input_tokens", body=counted, cast_to=object)
    assert count["input_tokens"] == usage.input_tokens


def test_reasoning_message_and_call_are_items(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL_NAME, input=CALL, tools=[TOOL])
    reasoning, message, call = answer.output
    assert reasoning.content[0].text == "hm"
    assert reasoning.summary == []
    assert message.content[0].text == answer.output_text == "I look."
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "f", {"a": 1})
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    assert answer.tools[0].name == "f"


def test_an_answer_that_is_too_long_is_incomplete(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL_NAME, input="Hello to you all", max_output_tokens=3)
    assert answer.status == answer.output[0].status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    with client.responses.stream(model=MODEL_NAME, input="Hello to you all", max_output_tokens=3) as events:
        last = list(events)[-1]
    assert last.type == "response.incomplete"
    assert last.response.output[0].content[0].text == answer.output_text


def test_log_probabilities(client: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    answer = client.responses.create(model=MODEL_NAME, input="Hello", include=include, top_logprobs=2)
    logprobs = answer.output[0].content[0].logprobs
    assert "".join(one.token for one in logprobs) == "Hello</s>"
    assert all(one.logprob == -0.5 and len(one.top_logprobs) == 2 for one in logprobs)
    answer = client.responses.create(model=MODEL_NAME, input=CALL, tools=[TOOL], include=include)
    assert "".join(one.token for one in answer.output[1].content[0].logprobs).endswith("I look.")
    assert client.responses.create(model=MODEL_NAME, input="Hello").output[0].content[0].logprobs == []


def test_a_form_is_parsed(client: openai.OpenAI) -> None:
    class Plant(BaseModel):
        plant: Literal["oak", "fern"]
        edible: bool

    text = '{"plant": "oak", "edible": false}'
    answer = client.responses.parse(model=MODEL_NAME, input=text, text_format=Plant)
    assert answer.output_parsed == Plant(plant="oak", edible=False)
    assert answer.text.format.type == "json_schema"
    with client.responses.stream(model=MODEL_NAME, input=text, text_format=Plant) as events:
        assert events.get_final_response().output_parsed == Plant(plant="oak", edible=False)


# ---- streams ----


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI, http: httpx.Client) -> None:
    with client.responses.stream(model=MODEL_NAME, input=CALL, tools=[TOOL]) as events:
        texts: dict[str, str] = {}
        for event in events:
            if event.type.endswith(".delta"):
                texts[event.type] = texts.get(event.type, "") + event.delta
        final = events.get_final_response()
    assert texts == {
        "response.reasoning_text.delta": "hm",
        "response.output_text.delta": "I look.",
        "response.function_call_arguments.delta": final.output[2].arguments,
    }
    assert final.output[2].parsed_arguments == {"a": 1}
    told = stream(http, input=CALL, tools=[TOOL])
    assert [event["type"].split(".", 1)[1] for event in told if "delta" not in event["type"]] == [
        "created",
        "in_progress",
        *["output_item.added", "content_part.added", "reasoning_text.done", "content_part.done", "output_item.done"],
        *["output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done"],
        *["output_item.added", "function_call_arguments.done", "output_item.done"],
        "completed",
    ]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    for event in (told[0], told[-1]):
        ResponseObject.model_validate(event["response"])
    assert client.responses.retrieve(told[-1]["response"]["id"]).to_dict() == told[-1]["response"]


def test_what_is_refused_before_a_stream_is_an_ordinary_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL_NAME, input="a " * CONTEXT_LEN, stream=True)
    assert caught.value.param == "input"
    assert caught.value.code == "context_length_exceeded"


def test_an_aborted_response_has_failed(slow_http: httpx.Client) -> None:
    events: list[Any] = []

    def run() -> None:
        events.extend(stream(slow_http, input="a b c d e f", max_output_tokens=200, rid="aborted-response"))

    thread = threading.Thread(target=run)
    thread.start()
    with httpx.Client(base_url=slow_http.base_url, timeout=30) as other:

        def abort() -> bool:
            answer = other.post("/abort_request", json={"rid": "aborted-response"})
            return not answer.json()["message"].startswith("0 ")

        wait_until(abort, "the request to abort")
        thread.join(30)
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["error"]["message"] == "the request was aborted"
        assert other.get(f"/v1/responses/{events[-1]['response']['id']}").status_code == 404  # it is not kept


def test_an_instance_that_dies_ends_the_stream(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("dying")
    model = write_weightless_model(folder / "model", CONTEXT_LEN)
    with ServerProcess(model, folder / "server.log", FAKE_STEP_S="0.05") as process:
        process.wait_ready()
        with (
            httpx.Client(base_url=process.url, timeout=30) as http,
            http.stream("POST", "/v1/responses", json={"input": "a", "stream": True}) as response,
        ):
            lines = response.iter_lines()
            assert next(lines) == "event: response.created"
            os.kill(process.child("fake_scheduler"), signal.SIGKILL)
            last = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")][-2:]
    assert [event["type"] for event in last] == ["response.failed", "error"]
    assert last[0]["response"]["status"] == "failed"
    assert last[0]["response"]["error"]["message"] == last[1]["message"] != ""
    assert last[1]["sequence_number"] == last[0]["sequence_number"] + 1


# ---- several turns ----


def test_a_function_is_called_and_its_answer_sent_back(client: openai.OpenAI, http: httpx.Client) -> None:
    asked = {"role": "user", "content": CALL}
    first = create(http, input=[asked], tools=[TOOL])
    call = first["output"][2]
    told = {"type": "function_call_output", "call_id": call["call_id"], "output": "show"}
    expected = [
        asked,
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": call["call_id"], "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
            ],
        },
        {"role": "tool", "content": "show", "tool_call_id": call["call_id"]},
    ]
    for body in (
        {"previous_response_id": first["id"], "input": [told]},
        {"input": [asked, *first["output"], told]},
        {"input": [asked, *({"type": "item_reference", "id": item["id"]} for item in first["output"]), told]},
        {"input": [asked, *({"id": item["id"]} for item in first["output"][:2]), call, told], "store": False},
    ):
        given = shown(create(http, tools=[TOOL], **body))
        for message in given["messages"]:
            message.pop("thinking", None)  # the same reasoning, for templates that call it so
        assert given["messages"] == expected
        assert given["tools"] == [{"type": "function", "function": FUNCTION}]


def test_instructions_are_not_carried_over(http: httpx.Client) -> None:
    first = create(http, input="Hello", instructions="Be brief.")
    given = shown(create(http, input="show", previous_response_id=first["id"]))
    assert given["messages"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "show"},
    ]


def test_reasoning_is_carried_by_a_client_that_looks_at_no_text(http: httpx.Client) -> None:
    first = create(http, input="<think>hm</think>Hello", include=["reasoning.encrypted_content"])
    reasoning = {key: first["output"][0][key] for key in ("id", "type", "summary", "encrypted_content")}
    given = shown(create(http, input=[reasoning, first["output"][1], {"role": "user", "content": "show"}]))
    assert given["messages"][0]["reasoning_content"] == "hm"
    assert "encrypted_content" not in create(http, input="<think>hm</think>Hello")["output"][0]


def test_tools_that_are_not_allowed_are_not_shown(http: httpx.Client) -> None:
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}
    tools = [TOOL, {"type": "function", "name": "g"}]
    answer = create(http, input="show", tools=tools, tool_choice=allowed)
    assert [tool["function"]["name"] for tool in shown(answer)["tools"]] == ["f"]
    assert [tool["name"] for tool in answer["tools"]] == ["f", "g"]
    assert answer["tool_choice"] == allowed


# ---- the memory ----


def test_a_response_is_remembered_until_it_is_deleted(client: openai.OpenAI, http: httpx.Client) -> None:
    first = client.responses.create(model=MODEL_NAME, input="one")
    second = client.responses.create(model=MODEL_NAME, input="two", previous_response_id=first.id)
    assert client.responses.retrieve(second.id) == second
    items = list(client.responses.input_items.list(second.id, order="asc", limit=1))
    assert [item.content[0].text for item in items] == ["one", "one", "two"]
    listed = http.get(f"/v1/responses/{second.id}/input_items")
    InputItems.model_validate_json(listed.text)
    assert [item["content"][0]["text"] for item in listed.json()["data"]] == ["two", "one", "one"]
    answer = http.delete(f"/v1/responses/{first.id}")
    DeletedResponse.model_validate_json(answer.text)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(first.id)
    third = client.responses.create(model=MODEL_NAME, input="three", previous_response_id=second.id)
    assert len(list(client.responses.input_items.list(third.id))) == 5


def test_what_is_not_to_be_stored_is_not(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL_NAME, input="one", store=False)
    assert answer.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL_NAME, input="two", previous_response_id=answer.id)
    assert caught.value.code == "previous_response_not_found"
    assert caught.value.param == "previous_response_id"


def test_a_large_body_is_looked_at_by_a_helper(http: httpx.Client) -> None:
    items = [{"role": "user", "content": "a"}] * 1200
    assert create(http, input=items)["output"][0]["content"][0]["text"] == "a"
    answer = http.post("/v1/responses", json={"input": [*items, {"role": "usr", "content": "a"}]})
    assert answer.status_code == 400
    assert "input[1200].role" in answer.json()["error"]["message"]


def test_a_short_input_can_not_refer_to_more_than_is_kept(http: httpx.Client) -> None:
    text = [{"role": "user", "content": "a" * 400_000}, {"role": "user", "content": "a"}]
    asked = create(http, input=text)
    items = http.get(f"/v1/responses/{asked['id']}/input_items", params={"order": "asc"}).json()["data"]
    (found,) = [one for one in items if len(one["content"][0]["text"]) == 400_000]
    error = http.post("/v1/responses", json={"input": [{"id": found["id"]}] * 4000}).json()["error"]
    assert error["param"] == "input" and "refers to" in error["message"]


# ---- what is refused ----


def image(kind: str, **fields: str) -> list[Any]:
    return [{"role": "user", "content": [{"type": kind, **fields}]}]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "input must be given"),
        ({"input": []}, "input", "not be empty"),
        ({"instructions": "Be brief."}, "input", "not be empty"),
        ({"input": 3}, "input", "a string or a list"),
        ({"input": image("input_image", image_url="http://a")}, "input", "not 'input_image'"),
        ({"input": image("input_file", file_id="a")}, "input", "not 'input_file'"),
        ({"input": image("input_audio")}, "input", "not 'input_audio'"),
        ({"input": [{"type": "computer_call"}]}, "input", "not 'computer_call'"),
        ({"input": [{"role": "usr", "content": "a"}]}, "input", r"input\[0\].role must be one of user"),
        ({"input": [{"type": "item_reference", "id": "msg_0"}]}, "input", "no item 'msg_0'"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "a"}]}, "input", "call_id 'c'"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools", r"tools\[0\].type must be function"),
        ({"input": "a", "tools": [{"type": "function", "name": "a b"}]}, "tools", r"tools\[0\].name"),
        ({"input": "a", "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"input": "a", "tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "'g'"),
        ({"input": "a", "tool_choice": {"type": "mcp"}}, "tool_choice", "not 'mcp'"),
        ({"input": "a", "truncation": "auto"}, "truncation", "not supported"),
        ({"input": "a", "background": True}, "background", "not supported"),
        ({"input": "a", "conversation": "conv_1"}, "conversation", "not supported"),
        ({"input": "a", "prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"input": "a", "top_logprobs": 2}, "top_logprobs", "include"),
        ({"input": "a", "include": ["everything"]}, "include", r"include\[0\]"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"input": "a", "max_output_tokens": 5000}, "max_output_tokens", "max_output_tokens is 5000"),
        ({"input": "a", "max_output_tokens": 2, "min_tokens": 3}, "min_tokens", r"above max_output_tokens \(2\)"),
        ({"input": "a", "reasoning": {"effort": "much"}}, "reasoning", "reasoning.effort"),
        ({"input": "a", "text": {"format": {"type": "json"}}}, "text", "text.format.type"),
        (
            {"input": "a", "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "plant"}}}},
            "text.format",
            "plant",
        ),
        ({"input": "a", "best_of": 2}, "best_of", "not supported"),
        ({"input": "a", "metadata": {"a": 1}}, "metadata", "a string"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streamed", [False, True])
def test_errors_name_what_is_wrong(http: httpx.Client, body: Any, param: str, words: str, streamed: bool) -> None:
    answer = http.post("/v1/responses", json={**body, "stream": streamed})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert re.search(words, error["message"]), error


def test_other_errors(http: httpx.Client) -> None:
    assert http.post("/v1/responses", json={"input": "a", "model": "other"}).status_code == 404
    answer = http.post("/v1/responses/resp_0/cancel")
    assert answer.status_code == 400
    assert "background" in answer.json()["error"]["message"]
    stored = create(http, input="a")
    path = f"/v1/responses/{stored['id']}"
    assert http.get(path, params={"stream": "true"}).json()["error"]["param"] == "stream"
    assert http.get(f"{path}/input_items", params={"limit": 101}).json()["error"]["param"] == "limit"
    assert http.get(f"{path}/input_items", params={"after": "nothing"}).json()["error"]["param"] == "after"
    assert http.get("/v1/responses/resp_0/input_items").status_code == 404
    counted = http.post("/v1/responses/input_tokens", json={"input": "a"})
    InputTokens.model_validate_json(counted.text)
