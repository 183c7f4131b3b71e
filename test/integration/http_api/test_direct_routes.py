"""A body goes the short way to its route or FastAPI's: what is answered is the same."""

import json

import httpx
import pytest
from server_process import MODEL_NAME

DIRECT, BY_FASTAPI = "application/json", "application/json; charset=utf-8"
BODIES = [
    b"",
    b"{",
    b"nonsense",
    b"null",
    b"[]",
    b"{}",
    b'"text"',
    b"\xff\xfe",
    b"9" * 5000,
    b"[" * 1900,
    b'{"text": "a", "input_ids": [1]}',
    b'{"input_ids": [1], "unknown": 1}',
    b'{"input_ids": [1, "2"]}',
    b'{"input_ids": [1.5]}',
    b'{"input_ids": [5], "sampling_params": {"max_new_tokens": 2.0}}',
    b'{"input_ids": [5], "sampling_params": {"temperature": NaN}}',
    b'{"input_ids": [5], "sampling_params": {"max_new_tokens": -1}}',
    b'{"input_ids": [99999]}',
    b'{"text": "\\ud800"}',
    json.dumps({"input_ids": [1] * 300}).encode(),
    b'{"model": "other", "prompt": "a"}',
    b'{"prompt": "a"}',
    json.dumps({"model": MODEL_NAME, "prompt": ""}).encode(),
    json.dumps({"model": MODEL_NAME, "prompt": [5], "max_tokens": 0}).encode(),
    json.dumps({"model": MODEL_NAME, "prompt": [5], "max_tokens": 2.0, "temperature": 0}).encode(),
    json.dumps({"model": MODEL_NAME, "prompt": [5], "stream_options": {"include_usage": True}}).encode(),
    json.dumps({"model": MODEL_NAME, "prompt": [99999], "stream": True}).encode(),
    json.dumps({"model": MODEL_NAME, "messages": []}).encode(),
    json.dumps({"prompt": [5], "max_tokens": 1, "best_of": 1, "unheard_of": None, "user": [1]}).encode(),
    json.dumps({"prompt": [5], "best_of": 2}).encode(),
    json.dumps({"messages": [{"role": "usr", "content": "a"}]}).encode(),
    json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "a", "id": 1}], "n": "2"}).encode(),
    b'{"text": "a", "lora_path": "x", "sampling_params": {"temperature": "hot"}}',
    b'{"text": "a", "sampling_params": {"temperature": "hot", "stop_regex": []}}',
    json.dumps({"model": MODEL_NAME, "messages": [{"role": "user", "content": 5}]}).encode(),
    json.dumps({"model": MODEL_NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}).encode(),
]


def ask(http: httpx.Client, path: str, body: bytes, content_type: str) -> tuple[int, object]:
    answer = http.post(path, content=body, headers={"Content-Type": content_type})
    content = answer.json()
    for name in ("id", "created", "meta_info"):
        content.pop(name, None)
    return answer.status_code, content


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_both_ways_answer_alike(http: httpx.Client, path: str) -> None:
    answers = [(ask(http, path, body, DIRECT), ask(http, path, body, BY_FASTAPI)) for body in BODIES]
    for body, (direct, by_fastapi) in zip(BODIES, answers, strict=True):
        assert direct == by_fastapi, body
    statuses = {status for (status, _), _ in answers}
    assert {200, 400} <= statuses <= {200, 400, 404}


def test_the_other_methods_are_fastapis(http: httpx.Client) -> None:
    for method in ("GET", "PUT"):
        answer = http.request(method, "/generate", headers={"Content-Type": DIRECT})
        assert answer.status_code == 405 and answer.json()["error"]["message"] == f"/generate takes POST, not {method}"
