"""Anthropic's routes: answers, streams, tools, thinking, counts, keys and errors.

The fake scheduler repeats the prompt, and the template of these tests shows the last message alone: what is said last
is what the model answers, in the form in which Hermes' and Qwen's models write thinking and calls.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ramet.srt.entrypoints.anthropic.answers import MessageAnswer, TokenCount
from ramet.srt.entrypoints.anthropic.message_events import whole_message
from server_process import MODEL_NAME, ServerProcess, write_weightless_model

CONTEXT_LEN = 512
TEMPLATE = """{%- if false -%}
<think></think> <tool_call>{"name": "a", "arguments": {}}</tool_call>
{%- endif -%}
{{ messages[-1]["content"] }}{% if tools %}|{{ tools | length }} tools{% endif %}"""
END = "</s>"
NO_FORM = {"type": "json_schema", "schema": {"not": {"type": "string"}}}  # that the scheduler finds out
WEATHER = {"name": "weather", "description": "Knows it", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm", "days": [1, 25]}}\n</tool_call>'


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_weightless_model(tmp_path_factory.mktemp("model"), CONTEXT_LEN)
    template = folder / "echo.jinja"
    template.write_text(TEMPLATE)
    log = tmp_path_factory.mktemp("messages_server") / "server.log"
    with ServerProcess(folder, log, "--chat-template", str(template), FAKE_STEP_S="0.001") as process:
        yield process.wait_ready().url
    assert "Traceback" not in process.output


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


def body_of(said: Any, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL_NAME, "max_tokens": 300, "messages": [{"role": "user", "content": said}], **fields}


def ask(client: httpx.Client, said: Any, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/messages", json=body_of(said, **fields))
    assert answer.status_code == 200, answer.text
    MessageAnswer.model_validate_json(answer.text)
    return answer.json()


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which is named by its type."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def stream(client: httpx.Client, said: Any, **fields: Any) -> list[dict[str, Any]]:
    answer = client.post("/v1/messages", json=body_of(said, stream=True, **fields))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events_of(answer.text)


def test_a_text(client: httpx.Client) -> None:
    message = ask(client, f"It is fine.{END}")
    assert message["content"] == [{"type": "text", "text": "It is fine."}]
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", MODEL_NAME)
    assert message["id"].startswith("msg_")
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    usage = message["usage"]
    assert usage["input_tokens"] == usage["output_tokens"] > 3  # it has repeated the prompt
    assert usage["cache_read_input_tokens"] == usage["cache_creation_input_tokens"] == 0


def test_what_ends_an_answer(client: httpx.Client) -> None:
    message = ask(client, "one two three", stop_sequences=["nothing", "two"])
    assert message["content"] == [{"type": "text", "text": "one "}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "two")
    message = ask(client, "one two three", max_tokens=2)
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    assert message["usage"]["output_tokens"] == 2
    message = ask(client, "one", max_tokens=0)
    assert (message["content"], message["stop_reason"]) == ([], "max_tokens")


SAID = f"<think>\nLet me see.\n</think>\n\nI look.\n{CALL}\n{CALL}{END}"
BLOCKS = [
    {"type": "thinking", "thinking": "Let me see.", "signature": ""},
    {"type": "text", "text": "I look."},
    {"type": "tool_use", "name": "weather", "input": {"city": "Ulm", "days": [1, 25]}},
]


def test_thinking_and_calls(client: httpx.Client) -> None:
    message = ask(client, SAID, tools=[WEATHER])
    ids = [block.pop("id") for block in message["content"] if block["type"] == "tool_use"]
    assert message["content"] == [*BLOCKS, BLOCKS[-1]]
    assert len(set(ids)) == 2
    assert message["stop_reason"] == "tool_use"
    assert 0 < message["usage"]["output_tokens_details"]["thinking_tokens"] < message["usage"]["output_tokens"]


def test_calls_are_text_where_no_tool_may_be_called(client: httpx.Client) -> None:
    for fields in ({}, {"tools": [WEATHER], "tool_choice": {"type": "none"}}):
        message = ask(client, f"{CALL}{END}", **fields)
        assert message["content"] == [{"type": "text", "text": CALL}]
        assert message["stop_reason"] == "end_turn"


def test_no_more_calls_than_are_wanted(client: httpx.Client) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = ask(client, SAID, tools=[WEATHER], tool_choice=choice)
    assert [block["type"] for block in message["content"]].count("tool_use") == 1


def test_a_call_that_is_cut_off_has_what_was_complete(client: httpx.Client) -> None:
    seen = []
    for max_tokens in range(1, ask(client, CALL, tools=[WEATHER], max_tokens=300)["usage"]["input_tokens"]):
        message = ask(client, CALL, tools=[WEATHER], max_tokens=max_tokens)
        assert message["stop_reason"] == "max_tokens"
        seen += [block["input"] for block in message["content"] if block["type"] == "tool_use"]
    wholes = [{}, {"city": "Ulm"}, {"city": "Ulm", "days": []}, {"city": "Ulm", "days": [1]}]
    wholes.append({"city": "Ulm", "days": [1, 25]})
    assert all(one in wholes for one in seen), seen
    assert {"city": "Ulm"} in seen and wholes[-1] in seen


def test_a_stream(client: httpx.Client) -> None:
    events = stream(client, SAID, tools=[WEATHER])
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "content_block_start", "ping"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"], start["model"]) == ([], None, MODEL_NAME)
    assert start["usage"]["input_tokens"] > 0
    assert kinds.count("content_block_delta") > 8  # it comes as it is made
    message = whole_message(events)
    MessageAnswer.model_validate(message)
    for block in message["content"]:
        block.pop("id", None)
    assert message["content"] == [*BLOCKS, BLOCKS[-1]]
    assert message["stop_reason"] == "tool_use"
    assert message["usage"]["output_tokens"] == ask(client, SAID, tools=[WEATHER])["usage"]["output_tokens"]


def test_thinking_may_be_left_out(client: httpx.Client) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    events = stream(client, SAID, thinking=thinking)
    assert "Let me" not in json.dumps(events)
    assert whole_message(events)["content"][0] == {"type": "thinking", "thinking": "", "signature": ""}


def test_a_result_of_a_tool_is_what_the_model_sees_last(client: httpx.Client) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Ulm"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": f"sunny{END}"}]}
    conversation = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    message = ask(client, "", messages=conversation, tools=[WEATHER])
    assert message["content"] == [{"type": "text", "text": "sunny"}]


def test_the_beginning_of_an_answer_is_continued(client: httpx.Client) -> None:
    conversation = [{"role": "user", "content": "How is it?"}, {"role": "assistant", "content": "It is"}]
    message = ask(client, "", messages=conversation, max_tokens=5)
    assert message["content"][0]["text"].startswith("It is")  # the prompt ends there, and is repeated


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER]}, {"system": "Be so."}])
def test_count_tokens_is_what_messages_count(client: httpx.Client, fields: dict[str, Any]) -> None:
    body = body_of(f"How is it?{END}", **fields)
    del body["max_tokens"]
    answer = client.post("/v1/messages/count_tokens", json=body)
    assert answer.status_code == 200, answer.text
    TokenCount.model_validate_json(answer.text)
    assert answer.json() == {"input_tokens": ask(client, f"How is it?{END}", **fields)["usage"]["input_tokens"]}


def test_a_large_body_is_looked_at_like_a_small_one(client: httpx.Client) -> None:
    filler = [{"role": role, "content": "a"} for role in ("user", "assistant")] * 1200
    message = ask(client, "", messages=[*filler, {"role": "user", "content": f"fine{END}"}])
    assert message["content"] == [{"type": "text", "text": "fine"}]
    answer = client.post("/v1/messages", json=body_of("", messages=[*filler, {"role": "tool", "content": "a"}]))
    assert answer.status_code == 400
    assert "messages[2400].role" in answer.json()["error"]["message"]


# ---- errors ----


HEADERS = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"messages": [], "max_tokens": 1}, 400, "invalid_request_error", "messages must not be empty"),
        ({"max_tokens": 1}, 400, "invalid_request_error", "messages must be given"),
        (body_of("a", model="other"), 404, "not_found_error", "'other' does not exist"),
        (body_of("a", max_tokens=10_000), 400, "invalid_request_error", "max_tokens"),
        (body_of("a", tool_choice={"type": "any"}), 400, "invalid_request_error", "tool_choice"),
        (body_of("a", output_config={"format": NO_FORM}), 400, "invalid_request_error", "output_config can't"),
    ],
)
def test_what_is_wrong_with_a_body(client: httpx.Client, body: Any, status: int, kind: str, words: str) -> None:
    for fields in ({}, {"stream": True}):
        answer = client.post("/v1/messages", json=body | fields)
        assert answer.status_code == status, answer.text
        assert_error(answer, kind, words)


@pytest.mark.parametrize(
    ("options", "status", "kind", "words"),
    [
        ({"content": b"{", "headers": HEADERS}, 400, "invalid_request_error", "JSON"),
        ({"json": {}, "headers": {"Content-Encoding": "gzip"}}, 415, "invalid_request_error", "compressed"),
        ({"json": {}, "headers": {"Origin": "http://elsewhere.example"}}, 403, "permission_error", "Origin"),
        ({"content": b"a" * (64 << 20 | 1), "headers": HEADERS}, 413, "request_too_large", "longer"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_what_goes_wrong_before(
    client: httpx.Client, path: str, options: Any, status: int, kind: str, words: str
) -> None:
    answer = client.post(path, **options)
    assert answer.status_code == status, answer.text
    assert_error(answer, kind, words)


def assert_error(answer: httpx.Response, kind: str, words: str) -> None:
    content = answer.json()
    assert (content["type"], content["error"]["type"]) == ("error", kind)
    assert words in content["error"]["message"]
    assert content["request_id"] == answer.headers["request-id"]
    assert set(content) == {"type", "error", "request_id"} and set(content["error"]) == {"type", "message"}


def test_clients_are_told_that_no_conversation_is_kept(client: httpx.Client) -> None:
    answer = client.post("/v1/messages", json=body_of("a", thread={"type": "create"}))
    assert answer.status_code == 400
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert answer.json()["error"]["details"] == details


def test_paths_and_methods_that_are_not_there(client: httpx.Client) -> None:
    answer = client.post("/v1/messages/batches", json={})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    answer = client.get("/v1/messages")
    assert (answer.status_code, answer.json()["error"]["type"]) == (405, "invalid_request_error")
    assert answer.headers["allow"] == "POST"
    assert "param" in client.get("/v1/messagesx").json()["error"]  # OpenAI's shape


def test_a_lone_surrogate_in_an_error_is_no_defect(client: httpx.Client) -> None:
    text = json.dumps(body_of("a", model="\ud800"))
    answer = client.post("/v1/messages", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404)
    assert answer.json()["type"] == "error"


def test_an_error_in_the_middle_of_a_stream_is_an_event(url: str) -> None:
    with httpx.Client(base_url=url, timeout=30) as client:
        body = body_of("a", max_tokens=400, stream=True)
        with client.stream("POST", "/v1/messages", json=body) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: message_start"
            httpx.post(f"{url}/abort_request", json={"abort_all": True})
            *_, name, data, _ = lines
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "the request was aborted"},
    }


def test_keys(tmp_path: Path) -> None:
    model = write_weightless_model(tmp_path / "model", CONTEXT_LEN)
    with ServerProcess(model, tmp_path / "log", "--api-key", "k", "--admin-api-key", "a") as server:
        url = server.wait_ready().url

        def status(path: str, **headers: str) -> int:
            answer = httpx.request("POST", f"{url}{path}", json=body_of("a", max_tokens=1), headers=headers)
            if answer.status_code == 401 and path == "/v1/messages":
                assert answer.json()["error"]["type"] == "authentication_error"
            return answer.status_code

        for path in ("/v1/messages", "/v1/chat/completions"):
            for headers in ({"X-Api-Key": "k"}, {"X-Api-Key": "a"}, {"Authorization": "Bearer k"}):
                assert status(path, **headers) == 200
            for headers in ({}, {"X-Api-Key": "k2"}, {"X-Api-Key": ""}, {"Authorization": "k"}):
                assert status(path, **headers) == 401
        assert status("/flush_cache", **{"X-Api-Key": "k"}) == 401
        refusal = httpx.post(f"{url}/flush_cache", headers={"X-Api-Key": "k"}).json()["error"]
        assert refusal["message"] == "/flush_cache needs the admin key (--admin-api-key)"
        assert status("/flush_cache", **{"X-Api-Key": "a"}) == 200
