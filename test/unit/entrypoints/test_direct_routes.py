"""The short way of users' requests: what stands before it, and what becomes of an error that nobody expects."""

import functools
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ramet.srt.configs.sentence_transformers import EmbeddingConfig
from ramet.srt.entrypoints.http.http_body import GENERATE_PATHS
from ramet.srt.entrypoints.http.http_counts import HttpCounts
from ramet.srt.entrypoints.http_api import create_app
from ramet.srt.managers.prepare_requests import Limits
from ramet.srt.server_args import ServerArgs

LIMITS = Limits(vocab_size=300, max_req_len=64, has_eos=True, grammars=False, embedding=EmbeddingConfig())
BODIES = {
    "/generate": {"input_ids": [5]},
    "/v1/completions": {"model": "m", "prompt": [5]},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "a"}]},
    "/v1/messages": {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"model": "m", "messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"model": "m", "input": "a"},
    "/v1/responses/input_tokens": {"model": "m", "input": "a"},
    "/encode": {"input_ids": [5]},
    "/v1/embeddings": {"input": [5]},
    "/v1/score": {"query": "a", "items": "b", "label_token_ids": [1]},
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), {"query": "a", "documents": ["b"]}),
}


async def fails(*_args: Any) -> None:
    raise KeyError("secret")


def make_instance(refusal: str | None = None, **args: Any) -> Any:
    manager = SimpleNamespace(limits=LIMITS, generate=fails, tokenizer=SimpleNamespace(has_chat_template=False))
    server_args = ServerArgs(model_path="m", **args)
    fields = {"server_args": server_args, "is_head": True, "refusal": lambda: refusal, "manager": manager}
    fields["http_counts"] = HttpCounts("m")
    return SimpleNamespace(**fields, reranker=SimpleNamespace(prompts=lambda *args: {}["secret"]))


@functools.cache
def app_of(api_key: str | None = None, refusal: str | None = None) -> Any:
    """One for all paths and requests: to make one takes longer than all that is asked of it."""
    return create_app(make_instance(refusal, api_key=api_key))


async def ask(app: Any, path: str, **headers: str) -> tuple[int, str]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.post(path, json=BODIES[path], headers=headers)
        return answer.status_code, answer.json()["error"]["message"]


def test_every_path_has_a_body() -> None:
    assert set(BODIES) == GENERATE_PATHS


@pytest.mark.parametrize("path", BODIES)
async def test_an_unexpected_error_tells_nothing(path: str) -> None:
    assert await ask(app_of(), path) == (500, "internal error")


@pytest.mark.parametrize("path", BODIES)
async def test_who_may_not_ask_gets_no_further(path: str) -> None:
    status, message = await ask(app_of("k"), path)
    assert status == 401 and "Authorization" in message
    for headers in ({"Authorization": "Bearer k"}, {"X-Api-Key": "k"}, {"Authorization": "Bearer x", "X-Api-Key": "k"}):
        assert (await ask(app_of("k"), path, **headers))[0] == 500
    for headers in ({"Authorization": "k"}, {"X-Api-Key": "Bearer k"}, {"X-Api-Key": ""}, {"X-Api-Key": "k2"}):
        assert (await ask(app_of("k"), path, **headers))[0] == 401
    assert (await ask(app_of(), path, Origin="http://elsewhere.example"))[0] == 403
    assert await ask(app_of(refusal="it is loading"), path) == (503, "it is loading")
