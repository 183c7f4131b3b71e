"""The other routes, the description of all of them, and aborts."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from http_answers import generate
from ramet.srt.entrypoints.http import answers
from ramet.srt.entrypoints.http.answers import NativeOutput
from ramet.srt.entrypoints.http.http_access import HEALTH_PATHS
from server_process import MODEL_NAME, wait_until

CONTEXT_LEN = 256


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
            if path not in HEALTH_PATHS:
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
        ("POST", "/reset_prefix_cache", None, answers.Done),
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


def test_pages_of_other_sites_are_refused_where_no_key_is_needed(http: httpx.Client) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        for method, path in (("POST", "/flush_cache"), ("GET", "/get_server_info"), ("POST", "/generate")):
            answer = http.request(method, path, headers=headers)
            assert answer.status_code == 403 and "--allowed-hosts" in answer.json()["error"]["message"]
        assert http.get("/health", headers=headers).status_code == 200
    assert http.get("/v1/models", headers={"Host": "localhost", "Origin": "http://localhost"}).status_code == 200


def test_lone_surrogates_are_the_clients_mistake_wherever_they_are(http: httpx.Client) -> None:
    def ask(path: str, body: str) -> int:
        return http.post(path, content=body, headers={"Content-Type": "application/json"}).status_code

    bad = r'"a\ud800"'
    fields = [f'"{name}": {bad}' for name in ("text", "rid", "stream")] + [f"{bad}: 1"]
    params = ["stop", "logit_bias", "regex", "json_schema", "temperature", "sampling_seed"]
    sampling = [f'"sampling_params": {{"{name}": {value}}}' for name in params for value in (bad, f"{{{bad}: 1}}")]
    for field in [*fields, *sampling]:
        assert ask("/generate", f'{{"text": "x", {field}}}') == 400, field
    model = '"model": "fake"'
    for field in ("rid", "stop", "bad_words", "logit_bias", "prompt", "json_schema"):
        for value in (bad, f"{{{bad}: {bad}}}"):
            assert ask("/v1/completions", f'{{{model}, "prompt": "x", "{field}": {value}}}') == 400, field
    for message in (f'"role": "user", "content": {bad}', f'"role": {bad}', f'"role": "user", "name": {bad}'):
        assert ask("/v1/chat/completions", f'{{{model}, "messages": [{{{message}}}]}}') == 400, message
    assert ask("/abort_request", f'{{"rid": {bad}}}') == 400
    assert ask("/start_profile", f'{{"output_dir": {bad}}}') == 400
