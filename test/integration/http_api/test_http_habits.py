"""What clients, proxies and pages do besides GET and POST: HEAD, slashes, ids, preflights, keys of the new routes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ramet
from ramet.srt.entrypoints.http import answers
from ramet.srt.entrypoints.http.http_access import OPEN_PATHS
from server_process import ServerProcess

GETS = ("/health", "/ready", "/ping", "/metrics", "/v1/models", "/model_info", "/server_info", "/get_load", "/v1/loads",
        "/version", "/docs", "/openapi.json", "/get_model_info", "/get_server_info", "/health_generate")  # fmt: skip
PAGE = "https://ui.example"
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def keyed(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with a key, that one site's pages may use, that takes templates, and whose requests have priorities."""
    log = tmp_path_factory.mktemp("keyed") / "server.log"
    flags = ("--api-key", "secret", "--allowed-hosts", "ui.example", "--trust-request-chat-template",
             "--schedule-policy", "priority")  # fmt: skip
    with ServerProcess(Path(model), log, *flags) as process, httpx.Client(base_url=process.url, timeout=30) as client:
        process.wait_ready()
        yield client
    assert "Traceback" not in process.output


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_a_body(http: httpx.Client, path: str) -> None:
    whole, head = http.get(path), http.head(path)
    assert whole.status_code == head.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert abs(int(head.headers["content-length"]) - len(whole.content)) < 200  # numbers in it change
    assert http.get(path + "/").status_code == http.head(path + "//").status_code == 200


def test_head_changes_nothing(http: httpx.Client) -> None:
    for path in ("/flush_cache", "/flush_cache/"):
        assert http.head(path).status_code == 405
    assert http.head("/generate").status_code == 405 and http.head("/nothing").status_code == 404


def test_a_trailing_slash_makes_no_difference(http: httpx.Client) -> None:
    for path in ("/v1/completions", "/v1/completions/", "/v1/completions//"):
        answer = http.post(path, json={"prompt": "a", "max_tokens": 1})
        assert answer.status_code == 200 and not answer.history
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()


def test_ids_of_requests(http: httpx.Client) -> None:
    for path in ("/health", "/nothing", "/generate"):
        assert http.get(path, headers={"X-Request-Id": "trace-7:a"}).headers["x-request-id"] == "trace-7:a"
    for bad in ("", "a b", "x" * 129, "é".encode()):
        own = http.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert own != bad and len(own) == 32
    ids = {http.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    body = {"prompt": "a", "max_tokens": 2, "stream": True}
    with http.stream("POST", "/v1/completions", json=body, headers={"X-Request-Id": "s"}) as response:
        assert response.headers["x-request-id"] == "s" and response.headers["content-type"].startswith("text/event")


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/tokenize", "/abort_request"])
@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_said_to_be_json(http: httpx.Client, path: str, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = http.post(path, content=b'{"text": "a"}', headers=headers)
    assert answer.status_code == 415
    message = answer.json()["error"]["message"]
    assert message.startswith("the Content-Type header must be application/json: ")
    assert (content_type or "missing") in message


def test_loads_and_version(http: httpx.Client) -> None:
    for path, kind in (("/v1/loads", answers.Loads), ("/version", answers.Version)):
        kind.model_validate_json(http.get(path).text)
    assert http.get("/version").json() == {"version": ramet.__version__}
    assert http.get("/get_load").json() == [{"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}]
    assert http.get("/v1/loads").json()["aggregate"]["total_reqs"] == 0
    assert http.get("/model_info").json() == http.get("/get_model_info").json()
    assert http.post("/ping").status_code == 200


def test_loads_of_a_busy_instance(slow_http: httpx.Client) -> None:
    body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 200, "n": 3}, "stream": True}
    with slow_http.stream("POST", "/generate", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        loads = slow_http.get("/v1/loads").json()
        assert loads["loads"][0]["num_running_reqs"] == loads["aggregate"]["total_reqs"] == 3
        assert 0 < loads["loads"][0]["token_usage"] < 1 and 0 < loads["loads"][0]["utilization"] < 1
        assert slow_http.get("/get_load").json()[0]["num_reqs"] == 3


def test_the_docs_page_needs_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "https://" not in page.text and "http://" not in page.text and "//cdn" not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")


def test_which_routes_need_the_key(keyed: httpx.Client) -> None:
    for path in {*GETS, *OPEN_PATHS}:
        statuses = [keyed.get(path, headers=headers).status_code for headers in ({}, KEY)]
        assert statuses == ([200, 200] if path in OPEN_PATHS else [401, 200]), path
    for path in ("/tokenize", "/detokenize", "/v1/tokenize/", "/generate/", "/flush_cache//"):
        assert keyed.post(path, json={}).status_code == keyed.head(path).status_code == 401
    assert "security" not in keyed.get("/openapi.json", headers=KEY).json()["paths"]["/docs"]["get"]


def test_pages_of_named_sites_can_read_answers(keyed: httpx.Client) -> None:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    preflight = keyed.options("/v1/chat/completions", headers={"Origin": PAGE} | wanted)
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == PAGE
    assert preflight.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    for headers, status in ((KEY, 200), ({}, 401)):
        answer = keyed.get("/v1/models", headers={"Origin": PAGE} | headers)
        assert answer.status_code == status and answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["vary"] == "Origin"


def test_pages_of_other_sites_can_not(keyed: httpx.Client, http: httpx.Client) -> None:
    wanted = {"Access-Control-Request-Method": "POST"}
    for origin in ("https://evil.example", "https://ui.example.evil.example", "null", "", "https://", "ui.example"):
        for client, status in ((keyed, 401), (http, 403)):
            for answer in (
                client.options("/generate", headers={"Origin": origin} | wanted),
                client.get("/health", headers={"Origin": origin}),
            ):
                assert answer.status_code in (status, 200)
                assert not [name for name in answer.headers if name.startswith("access-control")], origin
    assert keyed.options("/generate", headers={"Origin": PAGE}).status_code == 401, "no preflight"


def chat(keyed: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "grow"}], "max_tokens": 1, "return_token_ids": True} | fields
    return keyed.post("/v1/chat/completions", json=body, headers=KEY)


def test_a_template_of_the_request(keyed: httpx.Client) -> None:
    usual = chat(keyed).json()
    own = chat(keyed, chat_template="{{ messages[0].content }}{{ extra }}", chat_template_kwargs={"extra": "!"}).json()
    assert 0 < own["usage"]["prompt_tokens"] < usual["usage"]["prompt_tokens"]
    text = keyed.post("/detokenize", json={"tokens": own["prompt_token_ids"]}, headers=KEY).json()["text"]
    assert text == "grow!"
    effort = chat(keyed, chat_template="{{ reasoning_effort }}", reasoning_effort="high").json()["prompt_token_ids"]
    assert keyed.post("/detokenize", json={"tokens": effort}, headers=KEY).json()["text"] == "high"
    for bad in ("{{ messages[0 }}", "{% for %}", "{{ raise_exception('no') }}", "{{ 'x' * 100000000000 }}"):
        answer = chat(keyed, chat_template=bad)
        assert answer.status_code == 400 and "template" in answer.json()["error"]["message"]
    assert chat(keyed).json()["usage"] == usual["usage"]


def test_priorities_are_taken_where_they_count(keyed: httpx.Client) -> None:
    for priority in (0, 5, -5, 2**31 - 1, -(2**31)):
        assert chat(keyed, priority=priority).status_code == 200
        body = {"text": "a", "priority": priority, "sampling_params": {"max_new_tokens": 1}}
        assert keyed.post("/generate", json=body, headers=KEY).status_code == 200
    assert chat(keyed, priority=2**31).status_code == chat(keyed, priority=1.5).status_code == 400
