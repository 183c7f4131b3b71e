"""A clone takes its seed's hottest cached prefixes, and answers with them as the seed does."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import random_models as rm
from server_process import ServerProcess, wait_until

SEED = ("--remote-instance-weight-loader-start-seed-via-transfer-engine", "--engine-info-bootstrap-port", "0")
CLONE = ("--load-format", "remote_instance", "--engine-info-bootstrap-port", "0")
CACHE = ("--clone-prefix-cache", "0.5", "--max-total-tokens", "4096", "--served-model-name", "model")
PROMPT = [3 + number % 300 for number in range(400)]
KEY = "key-of-administrators"


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ServerProcess]]:
    folder = tmp_path_factory.mktemp("prefixes")
    model = rm.make_model(folder / "model", "llama2")
    rm.write_tokenizer(model)
    server = ServerProcess(model, folder / "seed.log", *SEED, *CACHE, "--admin-api-key", KEY, fake=False)
    try:
        server.wait_ready()
        yield model, server
    finally:
        server.kill()


def start_clone(model: Path, seed: ServerProcess, log: Path, *flags: str) -> ServerProcess:
    address = httpx.URL(seed.url)
    seeds = ("--remote-instance-weight-loader-seed-instance-ip", str(address.host))
    port = ("--remote-instance-weight-loader-seed-instance-service-port", str(address.port))
    return ServerProcess(model, log, *CLONE, *seeds, *port, *CACHE, *flags, fake=False)


def complete(server: ServerProcess, prompt: list[int]) -> dict[str, Any]:
    body = {"model": "model", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def cached(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def taken(server: ServerProcess) -> tuple[int, str]:
    """Tokens that were taken, and the rest of the line that says so."""
    found = wait_until(lambda: re.search(r"took (\d+) tokens of cached prefixes(.*)", server.output), "the taking")
    return int(found[1]), found[2]


def test_a_clone_answers_a_repeated_prompt_from_its_seeds_cache(
    seed: tuple[Path, ServerProcess], tmp_path: Path
) -> None:
    model, giver = seed
    assert cached(complete(giver, PROMPT)) == 0
    expected = complete(giver, PROMPT)
    assert cached(expected) > 300
    clone = start_clone(model, giver, tmp_path / "clone.log", "--admin-api-key", KEY)
    try:
        clone.wait_ready()
        num_tokens, _ = taken(clone)
        assert 390 <= num_tokens <= 2048, "at most the share of the cache"
        answer = complete(clone, PROMPT)
        assert cached(answer) == cached(expected), "the first request finds what the seed's second found"
        assert answer["choices"] == expected["choices"]
        other = [*PROMPT[:-100], *range(5, 105)]
        assert cached(complete(clone, other)) > 0
    finally:
        clone.kill()


def test_without_the_admins_key_nothing_of_what_users_wrote_is_given(
    seed: tuple[Path, ServerProcess], tmp_path: Path
) -> None:
    model, giver = seed
    complete(giver, PROMPT)
    clone = start_clone(model, giver, tmp_path / "clone.log")
    try:
        clone.wait_ready()
        num_tokens, reason = taken(clone)
        assert num_tokens == 0 and "HTTP 401" in reason
        assert cached(complete(clone, PROMPT)) == 0
    finally:
        clone.kill()
    body = {"content": "another model's", "max_pages": 10}
    asked = httpx.post(f"{giver.url}/prefix_cache_hottest", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert asked.status_code == 409
