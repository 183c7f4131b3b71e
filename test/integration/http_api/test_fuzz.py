"""Any body at all: the API answers it or says in its own words what is wrong, and never fails.

FUZZ_EXAMPLES=300 asks for longer.
"""

import json
import os
from typing import Any

import httpx
import pytest
from api_schema import Values, body_schemas
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PATHS = ("/generate", "/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/tokenize", "/detokenize",
         "/v1/detokenize", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/responses/input_tokens",
         "/encode", "/v1/embeddings", "/v1/score", "/v1/rerank", "/v2/rerank", "/rerank",
         "/abort_request", "/start_profile")  # fmt: skip
ADAPTERS = ("/load_lora_adapter", "/unload_lora_adapter", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
# Not asked here: they change what other requests meet, fetch from elsewhere, or
# look at weights, which the fake scheduler has not.
CHANGING = ("/pause_generation", "/continue_generation", "/update_weight_version", "/update_weights_from_disk",
            "/update_weights_from_instance", "/update_weights_delta", "/rollback_weights",
            "/begin_weight_update", "/end_weight_update", "/update_weights_from_tensor", "/update_weights_from_ipc",
            "/init_weights_update_group", "/update_weights_from_distributed", "/destroy_weights_update_group",
            "/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update",
            "/release_memory_occupation", "/resume_memory_occupation",
            "/weights_checker", "/get_weights_by_name")  # fmt: skip
# The model generates: it is neither made for embeddings nor for ranks, and takes no adapters.
REFUSED = ("/encode", "/v1/embeddings", "/v1/score", "/v1/rerank", "/v2/rerank", "/rerank", "/start_profile", *ADAPTERS)
# Other names of routes that are asked here.
ALIASES = ("/v1/tokenize", "/v1/detokenize")
NOISES = {path: (12,) if path in (*ALIASES, *REFUSED) else (0, 12, 3) for path in (*PATHS, *ADAPTERS)}
RESPONSES = "/v1/responses"
# Cut, so that the answers take no time.
LENGTHS = {"max_tokens", "max_new_tokens", "max_completion_tokens", "max_output_tokens", "n"}
# What a library of ours would say, and no API.
FOREIGN_WORDS = ("Input should", "pydantic", "Value error", "msgspec", "Expected `", "got `", "validation error",
                 "Traceback", "string_type", "discriminator", "Extra inputs")  # fmt: skip
WITHOUT_PARAM = ("the body must be a JSON object",)
NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))
FUZZ = settings(
    max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True, database=None
)


def cut(value: Any) -> Any:
    """The body with short outputs."""
    if isinstance(value, list):
        return [cut(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: min(one, 3) if name in LENGTHS and isinstance(one, int) and not isinstance(one, bool) else cut(one)
        for name, one in value.items()
    }


def complete(path: str, body: dict[str, Any]) -> None:
    """What a description can't be read for: that one of some fields is needed, and no more; that adapters are named."""
    if path not in ADAPTERS:
        body.pop("lora_path", None)
    if path.startswith(RESPONSES):
        body.setdefault("input", "a")
    elif path == "/generate" and body.get("input_ids") is None:
        body["text"] = body.get("text") or "a"
    elif path.endswith("/tokenize"):
        if body.get("messages") is None:
            body["prompt"] = body.get("prompt") or "a"
        else:
            body.pop("prompt", None)


def check(http: httpx.Client, path: str, body: Any) -> int:
    answer = http.post(path, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    shown = json.dumps(body)[:1000]
    assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text[:1000], shown)
    if path.startswith("/v1/messages"):
        check_messages(answer, shown)
        return answer.status_code
    if answer.headers["content-type"].startswith("text/event-stream"):
        lines = [line for line in answer.text.split("\n\n") if line]
        if path == RESPONSES:
            assert lines[-1].startswith(("event: response.completed\n", "event: response.incomplete\n")), (lines, shown)
            return 200
        assert lines[-1] == "data: [DONE]" and all(line.startswith("data: {") for line in lines[:-1]), shown
        assert not any('"status_code":500' in line or "internal error" in line for line in lines), (lines, shown)
        return 200
    content = answer.json()
    if answer.status_code != 200:
        error = content["error"]
        message = error["message"]
        assert message and not [words for words in FOREIGN_WORDS if words in message], (message, shown)
        assert error["type"] in ("invalid_request_error", "not_found_error")
        assert error["param"] is not None or message in WITHOUT_PARAM, (message, shown)
        assert error["param"] is None or error["param"][:20] in message or error["param"] == "messages", (error, shown)
    return answer.status_code


def check_messages(answer: httpx.Response, shown: str) -> None:
    """Anthropic's routes have its events and its shape of errors."""
    if answer.status_code == 200:
        assert "internal error" not in answer.text and "event: error" not in answer.text, (answer.text, shown)
        return
    error = answer.json()["error"]
    assert error["message"] and not [words for words in FOREIGN_WORDS if words in error["message"]], (error, shown)
    assert error["type"] in ("invalid_request_error", "not_found_error")


@pytest.fixture(scope="module")
def description(server: Any) -> Any:
    return httpx.get(f"{server.url}/openapi.json", timeout=30).json()


def test_every_body_is_known(description: Any) -> None:
    assert set(body_schemas(description)) == {*PATHS, *ADAPTERS, *CHANGING}


@pytest.mark.parametrize(("path", "noise"), [(path, noise) for path, noises in NOISES.items() for noise in noises])
def test_any_body_gets_an_answer_in_words_of_the_api(
    http: httpx.Client, description: Any, path: str, noise: int
) -> None:
    statuses: list[int] = []
    values = Values(description["components"]["schemas"], noise)

    @FUZZ
    @given(values.of(body_schemas(description)[path]))
    def fuzz(body: Any) -> None:
        if isinstance(body, dict) and noise == 0:
            complete(path, body)
        statuses.append(check(http, path, cut(body)))

    fuzz()
    if noise == 0 and path not in REFUSED:
        assert statuses.count(200) > len(statuses) / 20, "the description says what is taken"


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages", RESPONSES])
def test_each_field_by_itself(http: httpx.Client, description: Any, path: str) -> None:
    """Each field with many values beside a prompt: what the whole bodies seldom come to."""
    schemas = description["components"]["schemas"]
    schema = schemas[body_schemas(description)[path]["$ref"].rsplit("/", 1)[1]]
    prompts: dict[str, Any] = {
        "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 2}},
        "/v1/completions": {"prompt": "a", "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        RESPONSES: {"input": "a", "max_output_tokens": 2},
    }
    values = Values(schemas, 4)
    bodies = st.sampled_from(sorted(schema["properties"])).flatmap(
        lambda name: st.fixed_dictionaries({name: values.of(schema["properties"][name]), "stream": st.booleans()})
    )

    @settings(FUZZ, max_examples=5 * NUM_EXAMPLES)
    @given(bodies)
    def fuzz(body: Any) -> None:
        check(http, path, cut(prompts[path] | body))

    fuzz()


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', "[" * 1500, '{"a":' * 900])
def test_texts_that_are_hardly_json(http: httpx.Client, text: str) -> None:
    for body in (text, f'{{"prompt": "a", "max_tokens": {text}}}', f'{{"prompt": "a", "guided_json": {text}}}'):
        answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"], body[:60]
