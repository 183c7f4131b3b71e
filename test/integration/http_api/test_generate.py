"""SGLang's native route over real HTTP, with the fake scheduler behind it."""

import json
from typing import Any

import httpx
import pytest
from http_answers import events, generate, repeated
from ramet.srt.text.tokenizer import Tokenizer

CONTEXT_LEN = 256


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
