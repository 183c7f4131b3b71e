"""Where answers say which version of the weights they are from, with the fake scheduler behind them."""

import json
from typing import Any

import httpx
import openai
from http_answers import events, generate

SPAN = {"version": "default", "start": 0, "end": 3}


def test_native_answers_name_the_version(http: httpx.Client) -> None:
    params = {"max_new_tokens": 3}
    info = generate(http, text="a", sampling_params=params)["meta_info"]
    assert info["weight_version"] == "default" and info["weight_versions"] == [SPAN]
    body = {"text": "a", "sampling_params": params, "stream": True}
    streamed = [one["meta_info"] for one in events(http, "/generate", body)]
    assert {one["weight_version"] for one in streamed} == {"default"} and streamed[-1]["weight_versions"] == [SPAN]


def test_openai_answers_name_the_version(http: httpx.Client) -> None:
    completion = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3, "n": 2}).json()
    assert completion["metadata"] == {"weight_version": "default"}
    messages = [{"role": "user", "content": "a"}]
    chat = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 3}).json()
    assert chat["metadata"] == {"weight_version": "default"}
    response = http.post("/v1/responses", json={"input": "a", "max_output_tokens": 3, "metadata": {"a": "b"}}).json()
    assert response["metadata"] == {"a": "b", "weight_version": "default"}


def test_streams_name_the_version_at_the_end_of_each_choice(http: httpx.Client) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a", "max_tokens": 3, "n": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "n": 2}),
    ):
        chunks = events(http, path, body | {"stream": True})
        ends = [one for one in chunks if one["choices"] and one["choices"][0]["finish_reason"]]
        assert [one["metadata"] for one in ends] == [{"weight_version": "default"}] * 2
        assert not any("metadata" in one for one in chunks if one not in ends)


def test_anthropics_answers_name_the_version(http: httpx.Client) -> None:
    """In a stream at its end, as of everything else that is known only then."""
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
    assert http.post("/v1/messages", json=body).json()["metadata"] == {"weight_version": "default"}
    named = named_events(http, "/v1/messages", body)
    assert named["message_delta"]["metadata"] == {"weight_version": "default"}
    assert not any("metadata" in event for kind, event in named.items() if kind != "message_delta")


def test_a_streamed_response_names_the_version_at_its_end(http: httpx.Client) -> None:
    end = named_events(http, "/v1/responses", {"input": "a", "max_output_tokens": 3})["response.incomplete"]
    assert end["response"]["metadata"] == {"weight_version": "default"}


def named_events(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The last event of each kind."""
    text = http.post(path, json=body | {"stream": True}).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line.startswith("data: {")]
    return {event["type"]: event for event in events}


def test_openais_own_client_shows_it(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="", prompt="a", max_tokens=3)
    assert (answer.model_extra or {})["metadata"] == {"weight_version": "default"}


def test_the_instance_names_it(http: httpx.Client) -> None:
    assert http.get("/weight_info").json() == {"weight_version": "default"}
    for path in ("/model_info", "/get_model_info", "/server_info"):
        assert http.get(path).json()["weight_version"] == "default"
    assert 'ramet:weight_version{model_name="' in http.get("/metrics").text
    assert 'weight_version="default"} 1.0' in http.get("/metrics").text
