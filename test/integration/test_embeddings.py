"""Embeddings over real HTTP, by the published client, from a random model in the shape of a published one."""

import base64
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import random_models as rm
import torch
from cluster import Case, Cluster, Network, usual_or_all
from ramet import Engine
from ramet.srt.text.tokenizer import Tokenizer
from server_process import MODEL_NAME, ServerProcess, wait_until

TOLERANCE = 1e-4
TEXTS = ["grow a clone", "The quick brown fox jumps over the lazy dog. " * 6, "x"]
PROMPTS = rm.random_prompts([3, 40, 17, 120])
CONTEXT_LEN = 512
TOPOLOGIES = {
    "tp2": Case(tp_size=2),
    "pp2": Case(pp_size=2),
    "dp2": Case(dp_size=2),
    "dp_attention2": Case(tp_size=2, dp_size=2, dp_attention=True),
}


def append_end_token(folder: Path) -> None:
    """Have the tokenizer put a token behind each text, as that of Qwen3-Embedding does."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    piece = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, piece],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, piece, {"Sequence": {"id": "B", "type_id": 1}}, piece],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [rm.EOS], "tokens": ["</s>"]}},
    }
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = rm.make_embedding_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)
    append_end_token(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with ServerProcess(model, log, "--chunked-prefill-size", "64", "--max-total-tokens", "8192", fake=False) as process:
        yield process.wait_ready()
    assert "Traceback" not in process.output


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def expected(model: Path, prompts: list[list[int]], dimensions: int | None = None) -> np.ndarray:
    states = [state[:dimensions] for state in rm.hf_hidden_states(model, prompts)]
    return torch.nn.functional.normalize(torch.stack(states), dim=-1).numpy()


def test_the_published_client(client: openai.OpenAI, model: Path) -> None:
    ids = [Tokenizer.from_path(str(model)).encode(text) for text in TEXTS]
    assert all(one[-1] == rm.EOS for one in ids)  # the tokenizer's own doing
    wanted = expected(model, ids)
    for options in ({}, {"encoding_format": "float"}):  # by itself the client asks for base64
        answer = client.embeddings.create(model=MODEL_NAME, input=TEXTS, **options)
        assert [one.index for one in answer.data] == [0, 1, 2]
        np.testing.assert_allclose([one.embedding for one in answer.data], wanted, atol=TOLERANCE)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
        assert answer.model == MODEL_NAME
    one = client.embeddings.create(model=MODEL_NAME, input=TEXTS[1]).data
    np.testing.assert_allclose([one[0].embedding], wanted[1:2], atol=TOLERANCE)


def test_token_ids_and_lengths(client: openai.OpenAI, model: Path) -> None:
    for dimensions in (24, 80, None):
        options = {} if dimensions is None else {"dimensions": dimensions}
        answer = client.embeddings.create(model=MODEL_NAME, input=PROMPTS, **options)
        vectors = [one.embedding for one in answer.data]
        np.testing.assert_allclose(vectors, expected(model, PROMPTS, dimensions), atol=TOLERANCE)
        assert [math.hypot(*vector) for vector in vectors] == pytest.approx([1.0] * len(PROMPTS), abs=1e-6)
    answer = client.embeddings.create(model=MODEL_NAME, input=PROMPTS[0])
    np.testing.assert_allclose([answer.data[0].embedding], expected(model, PROMPTS[:1]), atol=TOLERANCE)


def test_options(http: httpx.Client, model: Path) -> None:
    def embed(**body: object) -> np.ndarray:
        answer = http.post("/v1/embeddings", json={"input": [PROMPTS[1]], **body})
        assert answer.status_code == 200, answer.text
        data = answer.json()["data"][0]["embedding"]
        return np.frombuffer(base64.b64decode(data), "<f4") if isinstance(data, str) else np.array(data)

    (state,) = (one.numpy() for one in rm.hf_hidden_states(model, PROMPTS[1:2]))
    np.testing.assert_allclose(embed(normalize=False), state, atol=10 * TOLERANCE)
    np.testing.assert_allclose(embed(normalize=False, dimensions=5), state[:5], atol=10 * TOLERANCE)
    np.testing.assert_array_equal(embed(encoding_format="base64"), embed().astype(np.float32))
    np.testing.assert_array_equal(embed(encoding_format=None, dimensions=None, user="me"), embed())
    plain = Tokenizer.from_path(str(model)).encode("grow a clone", add_special_tokens=False)
    answer = http.post("/v1/embeddings", json={"input": "grow a clone", "add_special_tokens": False}).json()
    assert answer["usage"]["prompt_tokens"] == len(plain)
    assert answer["metadata"] == {"weight_version": "default"}


def test_native_answers(http: httpx.Client, model: Path) -> None:
    answer = http.post("/encode", json={"input_ids": PROMPTS, "rid": "mine"}).json()
    np.testing.assert_allclose([one["embedding"] for one in answer], expected(model, PROMPTS), atol=TOLERANCE)
    assert [one["meta_info"]["prompt_tokens"] for one in answer] == [len(prompt) for prompt in PROMPTS]
    assert answer[2]["meta_info"]["id"] == "mine_2"
    assert {one["meta_info"]["weight_version"] for one in answer} == {"default"}
    one = http.post("/encode", json={"text": TEXTS[0], "dimensions": 3}).json()
    assert len(one["embedding"]) == 3


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "input"),
        ({"input": ""}, "input", "input"),
        ({"input": []}, "input", "input"),
        ({"input": ["a", ""]}, "input", "input[1]"),
        ({"input": ["a", 5]}, "input", "input"),
        ({"input": [[5], []]}, "input", "input"),
        ({"input": [5, 400]}, "input", "[0, 331)"),
        ({"input": [[5], [400]]}, "input[1]", "[0, 331)"),
        ({"input": [5] * (CONTEXT_LEN + 1)}, "input", "513 tokens; the context of 512 tokens"),
        ({"input": ["a", "word " * 2000]}, "input[1]", "the context of 512 tokens"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": "a", "model": "other"}, "model", "'other' does not exist"),
        ({"input": "a", "dimensions": 0}, "dimensions", "dimensions"),
        ({"input": "a", "dimensions": 81}, "dimensions", "at most 80"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "truncate_prompt_tokens"),
    ],
)
def test_bad_bodies(http: httpx.Client, body: dict, param: str, words: str) -> None:
    answer = http.post("/v1/embeddings", json=body)
    error = answer.json()["error"]
    assert answer.status_code == (404 if "exist" in words else 400)
    assert error["param"] == param
    assert words in error["message"]


def test_a_prompt_may_fill_the_context(http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", json={"input": [5] * CONTEXT_LEN})
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == CONTEXT_LEN


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a"}),
        ("/v1/completions", {"model": MODEL_NAME, "prompt": "a"}),
        ("/v1/chat/completions", {"model": MODEL_NAME, "messages": [{"role": "user", "content": "a"}]}),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [5]}),
    ],
)
def test_it_makes_nothing_else(http: httpx.Client, path: str, body: dict) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert "makes embeddings" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "model"


def test_large_bodies_are_looked_at_elsewhere(http: httpx.Client, server: ServerProcess) -> None:
    answer = http.post("/v1/embeddings", json={"input": [[5, 6, 7]] * 1500, "dimensions": 1})
    assert len(answer.json()["data"]) == 1500
    assert server.child("body_process")


def test_health_and_numbers(http: httpx.Client, server: ServerProcess) -> None:
    assert http.get("/health_generate").status_code == 200
    assert http.get("/get_model_info").json()["is_generation"] is False
    assert http.post("/v1/embeddings", json={"input": PROMPTS[3]}).status_code == 200
    metrics = http.get("/metrics").text
    counted = next(line for line in metrics.splitlines() if line.startswith("ramet:num_requests_total{"))
    assert float(counted.split()[-1]) > 0
    wait_until(lambda: http.get("/get_server_info").json()["internal_states"][0]["num_running_reqs"] == 0, "rest")
    assert http.post("/flush_cache").status_code == 200  # nothing holds a page


def test_a_client_that_goes_away(http: httpx.Client, server: ServerProcess) -> None:
    """Its prompts end, and what others wait for comes."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/embeddings", json={"input": rm.random_prompts([500] * 200)}, timeout=0.3)
    assert http.post("/v1/embeddings", json={"input": PROMPTS[0]}).status_code == 200
    wait_until(lambda: http.get("/get_server_info").json()["internal_states"][0]["num_running_reqs"] == 0, "rest")
    assert "aborted_requests_total" in http.get("/metrics").text
    assert http.post("/flush_cache").status_code == 200


@pytest.mark.parametrize("name", usual_or_all(("pp2", "dp_attention2"), ("tp2", "dp2")))
def test_topologies(model: Path, tmp_path: Path, name: str) -> None:
    wanted = expected(model, PROMPTS)
    with (
        Network(1) as network,
        Cluster(TOPOLOGIES[name], network.hosts, model, tmp_path, "--chunked-prefill-size", "32") as cluster,
    ):
        cluster.wait_ready()

        def embed(index: int) -> list[float]:
            status, answer = cluster.head.request("/v1/embeddings", {"input": PROMPTS[index]})
            assert status == 200, answer
            return answer["data"][0]["embedding"]

        for _ in range(2):  # over every replica, and with a warm prefix cache
            np.testing.assert_allclose([embed(index) for index in range(4)], wanted, atol=TOLERANCE)
        with ThreadPoolExecutor() as pool:  # all at once: several micro-batches, several attention groups in one pass
            vectors = list(pool.map(embed, [*range(4)] * 3))
        np.testing.assert_allclose(vectors, np.concatenate([wanted] * 3), atol=TOLERANCE)


def test_engine(model: Path) -> None:
    with Engine(model_path=str(model), max_total_tokens=1024) as engine:
        one = engine.encode(input_ids=PROMPTS[0])
        np.testing.assert_allclose([one["embedding"]], expected(model, PROMPTS[:1]), atol=TOLERANCE)
        assert len(engine.encode(["a", "b"], dimensions=3)[1]["embedding"]) == 3
        with pytest.raises(ValueError, match="text"):
            engine.encode()
        with pytest.raises(ValueError, match="makes embeddings"):
            engine.generate("a")


def test_a_pooling_that_is_not_supported_ends_the_start(model: Path, tmp_path: Path) -> None:
    folder = rm.without_weights(model, tmp_path / "model")
    rm.write_pooling(folder, mode="mean_tokens")
    with ServerProcess(folder, tmp_path / "log", fake=False) as process:
        assert process.wait_exit() == 1
        assert "1_Pooling/config.json: embeddings by the last token's" in process.output
