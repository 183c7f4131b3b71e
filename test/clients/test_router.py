"""sglang-router in front of two instances: every route and policy, and an instance that is killed."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from clients.client_run import kept_file
from clients.conftest import FLOW, SERVER_FLAGS, PlainAnswers
from clients.router_process import RouterProcess
from clients.wire_tap import WireTap
from server_process import MODEL_NAME, ServerProcess

POLICIES = ("round_robin", "cache_aware", "power_of_two")
CHAT: dict[str, Any] = {
    "model": MODEL_NAME,
    "messages": [{"role": "system", "content": FLOW["system"]}, {"role": "user", "content": FLOW["question"]}],
    "max_tokens": FLOW["max_tokens"],
    "temperature": 0,
}
COMPLETION: dict[str, Any] = {
    "model": MODEL_NAME, "prompt": FLOW["prompt"], "max_tokens": FLOW["max_tokens"], "temperature": 0,
}  # fmt: skip
GENERATE: dict[str, Any] = {
    "text": FLOW["prompt"], "sampling_params": {"max_new_tokens": FLOW["max_tokens"], "temperature": 0},
}  # fmt: skip


@dataclass
class Pair:
    """A router over two instances; `second` is this test's own, and may be killed."""

    router: RouterProcess
    second: ServerProcess
    taps: tuple[WireTap, ...]

    def num_answered(self) -> list[int]:
        """How many generations each instance has answered with 200."""
        return [tap.num_answered("POST /", "HTTP/1.1 200") for tap in self.taps]


@pytest.fixture(params=POLICIES)
def pair(
    request: pytest.FixtureRequest, server: ServerProcess, model: Path, tmp_path: Path,
    record_property: Callable[..., None],
) -> Iterator[Pair]:  # fmt: skip
    policy = request.param
    record_property("client", "sglang_router")
    record_property("step", f"{policy}: {request.function.__name__.removeprefix('test_').replace('_', ' ')}")
    name = f"router_{policy}_{request.function.__name__}"
    with ServerProcess(model, tmp_path / "second.log", *SERVER_FLAGS, fake=False) as second:
        second.wait_ready()
        taps = (
            WireTap(server.url, kept_file(f"{name}_first.wire.jsonl")),
            WireTap(second.url, kept_file(f"{name}_second.wire.jsonl")),
        )
        try:
            with RouterProcess([tap.url for tap in taps], policy, kept_file(f"{name}.log")) as router:
                router.wait_workers(2)
                yield Pair(router, second, taps)
        finally:
            for tap in taps:
                tap.close()


def streamed_text(answer: Any, text_of: Callable[[dict[str, Any]], str]) -> list[str]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [text_of(json.loads(line)) for line in lines[:-1]]


def test_every_route(pair: Pair, plain: PlainAnswers) -> None:
    """Answers are those of an instance without a router, whole and streamed."""
    post = pair.router.post
    answer = post("/v1/chat/completions", **CHAT)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == plain.chat
    pieces = streamed_text(
        post("/v1/chat/completions", **CHAT, stream=True),
        lambda event: event["choices"][0]["delta"].get("content") or "",
    )
    assert "".join(pieces) == plain.chat
    answer = post("/v1/completions", **COMPLETION)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == plain.completion
    pieces = streamed_text(
        post("/v1/completions", **COMPLETION, stream=True), lambda event: event["choices"][0]["text"]
    )
    assert "".join(pieces) == plain.completion
    answer = post("/generate", **GENERATE)
    assert answer.status_code == 200, answer.text
    assert answer.json()["text"] == plain.completion
    texts = streamed_text(post("/generate", **GENERATE, stream=True), lambda event: event["text"])
    assert texts[-1] == plain.completion


def test_requests_are_spread(pair: Pair, request: pytest.FixtureRequest) -> None:
    """Sixteen at once: by turns, by their prefixes, or by load, as the policy says."""
    policy = request.node.callspec.params["pair"]
    prompts = [f"{FLOW['prompt']} {'one' if number % 2 else 'no'} plant" for number in range(16)]
    if policy == "cache_aware":
        prompts = ["A ramet is one plant of a clonal colony and it grows out of another"] * 16
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: pair.router.post("/v1/completions", **{**COMPLETION, "prompt": prompt}),
                                prompts))  # fmt: skip
    assert [answer.status_code for answer in answers] == [200] * 16, answers[0].text
    counts = pair.num_answered()
    assert sum(counts) == 16
    if policy == "round_robin":
        assert counts == [8, 8]
    elif policy == "cache_aware":
        assert sorted(counts) == [0, 16]
    else:
        assert min(counts) > 0


def test_a_killed_instance(pair: Pair, plain: PlainAnswers) -> None:
    """One of two is killed while requests run: those that come after it are all answered by the other one."""
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(pair.router.post, "/v1/completions", **COMPLETION) for _ in range(8)]
        pair.second.kill()
        for one in running:
            one.result()  # an answer, whichever
        answers = [pair.router.post("/v1/completions", **COMPLETION) for _ in range(8)]
    assert [answer.status_code for answer in answers] == [200] * 8, answers[0].text
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {plain.completion}
    pair.router.wait_workers(1)
    assert pair.router.post("/v1/chat/completions", **CHAT).json()["choices"][0]["message"]["content"] == plain.chat
