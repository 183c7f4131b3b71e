"""Every route over real HTTP, by the published clients, with the fake scheduler behind it."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from ramet.srt.entrypoints import answers
from ramet.srt.entrypoints.answers import NativeOutput
from ramet.srt.utils.tokenizer import Tokenizer
from server_process import MODEL_NAME, ServerProcess, wait_until, write_weightless_model

CONTEXT_LEN = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_weightless_model(tmp_path_factory.mktemp("model"), CONTEXT_LEN))


@pytest.fixture(scope="module")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(model, log, FAKE_STEP_S="0.002") as process:
        yield process.wait_ready()
    assert "Traceback" not in process.output


@pytest.fixture(scope="module")
def slow_server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One whose requests are still running when they are wanted to be."""
    log = tmp_path_factory.mktemp("slow_server") / "server.log"
    with ServerProcess(model, log, FAKE_STEP_S="0.05") as process:
        yield process.wait_ready()


@pytest.fixture
def slow_http(slow_server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=slow_server.url, timeout=30) as client:
        yield client


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(model: str) -> Tokenizer:
    return Tokenizer.from_path(model)


def repeated(tokenizer: Tokenizer, prompt: str, num_tokens: int) -> str:
    """What the fake scheduler makes of a prompt."""
    ids = tokenizer.encode(prompt)
    return tokenizer.decode([ids[place % len(ids)] for place in range(num_tokens)], skip_special_tokens=True)


def generate(http: httpx.Client, **body: Any) -> Any:
    response = http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    for one in answer if isinstance(answer, list) else [answer]:
        NativeOutput.model_validate(one)
    return answer


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    """The JSON events of a stream that must end with [DONE]."""
    with http.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# ---- /generate ----


def test_generate_text(http: httpx.Client, tokenizer: Tokenizer) -> None:
    output = generate(http, text="grow a clone", sampling_params={"max_new_tokens": 9})
    assert output["text"] == repeated(tokenizer, "grow a clone", 9)
    assert len(output["output_ids"]) == 9
    info = output["meta_info"]
    assert info["finish_reason"] == {"type": "length", "length": 9}
    assert info["prompt_tokens"] == len(tokenizer.encode("grow a clone"))
    assert info["completion_tokens"] == 9
    assert info["cached_tokens"] == 0
    assert info["e2e_latency"] > 0


def test_generate_ids_lists_and_n(http: httpx.Client) -> None:
    output = generate(http, input_ids=[10, 11], sampling_params={"max_new_tokens": 3}, rid="mine")
    assert output["output_ids"] == [10, 11, 10]
    assert output["meta_info"]["id"] == "mine"
    outputs = generate(http, input_ids=[[10], [20]], sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2}])
    assert [one["output_ids"] for one in outputs] == [[10], [20, 20]]
    outputs = generate(http, input_ids=[10], sampling_params={"max_new_tokens": 1, "n": 3})
    assert [one["output_ids"] for one in outputs] == [[10]] * 3
    assert generate(http, text=["a"], sampling_params={"max_new_tokens": 1})[0]["output_ids"]


def test_generate_stream_is_cumulative(http: httpx.Client, tokenizer: Tokenizer) -> None:
    body = {"text": "plant 植物", "sampling_params": {"max_new_tokens": 12}, "stream": True}
    outputs = events(http, "/generate", body)
    texts = [one["text"] for one in outputs]
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))
    assert texts[-1] == repeated(tokenizer, "plant 植物", 12)
    assert [one["meta_info"]["finish_reason"] for one in outputs][-1]["type"] == "length"
    assert len(outputs) > 1


def test_generate_stream_of_several_has_indexes(http: httpx.Client) -> None:
    body = {"input_ids": [[10], [20]], "sampling_params": {"max_new_tokens": 4}, "stream": True}
    last = {one["index"]: one["output_ids"] for one in events(http, "/generate", body)}
    assert last == {0: [10] * 4, 1: [20] * 4}


def test_generate_logprobs(http: httpx.Client, tokenizer: Tokenizer) -> None:
    output = generate(
        http,
        input_ids=[10, 11, 12],
        sampling_params={"max_new_tokens": 2},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        return_text_in_logprobs=True,
    )
    info = output["meta_info"]
    words = [tokenizer.token_bytes(one).decode(errors="replace") for one in (10, 11, 12)]
    assert info["output_token_logprobs"] == [[-0.5, 10, words[0]], [-0.5, 11, words[1]]]
    assert info["input_token_logprobs"] == [[None, 10, words[0]], [-0.5, 11, words[1]], [-0.5, 12, words[2]]]
    assert [len(one) for one in info["output_top_logprobs"]] == [2, 2]
    assert info["input_top_logprobs"][0] is None
    without = generate(http, input_ids=[10], sampling_params={"max_new_tokens": 1}, return_logprob=True)["meta_info"]
    assert without["output_token_logprobs"] == [[-0.5, 10, None]]
    assert without["input_token_logprobs"] == []


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_is_cut_off(http: httpx.Client, tokenizer: Tokenizer, stream: bool) -> None:
    whole = repeated(tokenizer, "quick brown fox", 30)
    stop = whole[7:12]
    body = {"text": "quick brown fox", "sampling_params": {"max_new_tokens": 30, "stop": [stop]}, "stream": stream}
    outputs = events(http, "/generate", body) if stream else [generate(http, **body)]
    assert outputs[-1]["text"] == whole[:7]
    assert all(whole[:7].startswith(one["text"]) for one in outputs)
    assert outputs[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    body["sampling_params"]["no_stop_trim"] = True
    outputs = events(http, "/generate", body) if stream else [generate(http, **body)]
    assert outputs[-1]["text"] == whole[:12]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": ""}, "text"),
        ({"text": []}, "text"),
        ({"text": ["a", ""]}, "text"),
        ({"text": 5}, "text"),
        ({"text": "a\ud800"}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [331]}, "input_ids"),
        ({"input_ids": [-1]}, "input_ids"),
        ({"input_ids": ["1"]}, "input_ids"),
        ({"text": "a", "sampling_params": {"top_p": 7}}, "top_p"),
        ({"text": "a", "sampling_params": {"best_of": 7}}, "best_of"),
        ({"text": "a", "sampling_params": []}, "sampling_params"),
        ({"text": "a", "sampling_params": {"regex": "("}}, "regex"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "stream": "yes"}, "stream"),
        ({"text": "a", "rid": ""}, "rid"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 99}, "logprob_start_len"),
        ({"text": "a", "top_logprobs_num": 10**20}, "top_logprobs_num"),
        ({"input_ids": [5] * CONTEXT_LEN}, "input_ids"),
        ({"input_ids": [5] * (CONTEXT_LEN + 999)}, "input_ids"),
        ({"input_ids": [5] * 200, "sampling_params": {"max_new_tokens": 57}}, "max_new_tokens"),
    ],
)
def test_generate_refuses_by_name(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        response = http.post("/generate", content=json.dumps({"stream": stream} | body), headers=JSON)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
        assert set(error) == {"message", "type", "param", "code"}


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/abort_request"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"text": NaN}',
        b'{"temperature": Infinity, "model": "fake", "prompt": "a"}',
        b"[" * 100_000,
        b'{"text":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"\\ud800": 1}',
    ],
    ids=lambda content: content[:20].decode("latin-1"),
)
def test_malformed_bodies_are_the_clients_mistake(http: httpx.Client, path: str, content: bytes) -> None:
    response = http.post(path, content=content, headers=JSON)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_default_length_fits_into_the_context(http: httpx.Client) -> None:
    output = generate(http, input_ids=[5] * 200)
    assert output["meta_info"]["completion_tokens"] == CONTEXT_LEN - 200


# ---- OpenAI ----


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
    assert len(choice.logprobs.top_logprobs[1]) == 2


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
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"functions": []}, "functions", "unsupported_parameter"),
        ({"tool_choice": "auto"}, "tool_choice", "unsupported_parameter"),
        ({"temperature": 3}, "temperature", None),
        ({"n": 0}, "n", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_tokens": CONTEXT_LEN}, "max_tokens", "context_length_exceeded"),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"min_tokens": 9, "max_tokens": 2}, "min_tokens", None),
        ({"logit_bias": {"9999": 1}}, "logit_bias", None),
        ({"response_format": {"type": "grammar"}}, "response_format", None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 3}}}}, None, None),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", None),
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", None),
        ({"messages": [{"role": "user"}]}, "messages", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", None),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "weight", "unsupported_parameter"),
    ],
)
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


# ---- the rest ----


def test_information(http: httpx.Client, model: str) -> None:
    info = http.get("/get_model_info").json()
    assert info["model_path"] == model
    assert info["is_generation"] is True
    info = http.get("/get_server_info").json()
    assert info["max_req_len"] == CONTEXT_LEN
    assert info["ranks"][0]["load_report"]["source"] == "dummy"
    assert info["startup_phases"]["ready"] > 0
    assert "api_key" not in info
    assert info["internal_states"][0]["num_running_reqs"] == 0
    assert http.get("/health").status_code == 200
    assert http.get("/health_generate").status_code == 200
    for method in ("GET", "POST"):
        assert http.request(method, "/flush_cache").json()["success"] is True


def test_no_weights_registered(http: httpx.Client) -> None:
    for path in ("/remote_instance_transfer_engine_info", "/get_remote_instance_transfer_engine_info"):
        assert http.get(path, params={"rank": 0}).status_code == 404
        assert http.get(path, params={"rank": -1}).status_code == 400
        assert http.get(path).status_code == 400


def test_metrics(http: httpx.Client) -> None:
    generate(http, input_ids=[5, 6], sampling_params={"max_new_tokens": 3})
    text = http.get("/metrics").text
    for name in (
        "prompt_tokens_total",
        "generation_tokens_total",
        "num_running_reqs",
        "num_queue_reqs",
        "cache_hit_rate",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "num_aborted_requests_total",
        "weight_load_bytes",
        "weight_load_seconds",
    ):
        assert f"ramet:{name}{{" in text
    assert 'source="dummy"' in text
    assert "_created" not in text


def num_running(http: httpx.Client) -> int:
    return http.get("/get_server_info").json()["internal_states"][0]["num_running_reqs"]


def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    assert http.get("/nothing").json()["error"]["type"] == "not_found_error"
    response = http.get("/generate")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["message"]


def test_openapi_describes_every_error_as_we_send_it(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            if not path.startswith("/health"):
                assert {"400", "401", "500", "503"} <= set(operation["responses"])
    ids = [operation["operationId"] for operations in schema["paths"].values() for operation in operations.values()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("method", "path", "body", "description"),
    [
        ("GET", "/health", None, answers.Status),
        ("GET", "/v1/models", None, answers.ModelList),
        ("GET", f"/v1/models/{MODEL_NAME}", None, answers.ModelCard),
        ("GET", "/get_model_info", None, answers.ModelInfo),
        ("POST", "/flush_cache", None, answers.Done),
        ("POST", "/abort_request", {"rid": "x"}, answers.Done),
        ("POST", "/generate", {"text": "a", "return_logprob": True, "top_logprobs_num": 2}, NativeOutput),
        ("POST", "/v1/completions", {"prompt": "a", "logprobs": 2, "echo": True}, answers.Completion),
        (
            "POST",
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2},
            answers.ChatCompletion,
        ),
    ],
)
def test_answers_are_as_described(http: httpx.Client, method: str, path: str, body: Any, description: Any) -> None:
    if body is not None and path.startswith("/v1"):
        body = {"model": MODEL_NAME, **body}
    response = http.request(method, path, json=body)
    assert response.status_code == 200, response.text
    description.model_validate_json(response.text)


# ---- aborts ----


def test_abort_request_ends_it_with_what_it_has(slow_http: httpx.Client) -> None:
    body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 250}, "rid": "to-abort", "stream": True}
    with slow_http.stream("POST", "/generate", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        answer = slow_http.post("/abort_request", json={"rid": "to-abort"})
        assert answer.json() == {"success": True, "message": "1 sequences are being aborted"}
        last = [line for line in lines if line][-2:]
    output = json.loads(last[0].removeprefix("data: "))
    assert output["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(output["output_ids"]) < 250
    assert last[1] == "data: [DONE]"
    assert slow_http.post("/abort_request", json={"rid": "unknown"}).status_code == 200
    assert slow_http.post("/abort_request", json={}).status_code == 400


def test_a_running_id_can_not_be_taken_twice(slow_http: httpx.Client) -> None:
    body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 250}, "rid": "twice", "stream": True}
    with slow_http.stream("POST", "/generate", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        answer = slow_http.post("/generate", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "rid"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request(slow_http: httpx.Client, stream: bool) -> None:
    wait_until(lambda: num_running(slow_http) == 0, "an idle server")

    async def leave() -> None:
        body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 250, "n": 4}, "stream": stream}
        async with httpx.AsyncClient(base_url=slow_http.base_url) as client:
            request = asyncio.create_task(client.post("/generate", json=body))
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and not await asyncio.to_thread(num_running, slow_http):
                await asyncio.sleep(0.005)
            request.cancel()
            await asyncio.wait([request])

    asyncio.run(leave())
    started = time.monotonic()
    wait_until(lambda: num_running(slow_http) == 0, "the end of the request")
    assert time.monotonic() - started < 5, "250 steps take 12 s: it ended early"
