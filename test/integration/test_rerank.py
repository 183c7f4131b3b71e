"""Scores and ranks over real HTTP: the probabilities that transformers gives for the same prompts."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import random_models as rm
import torch
from cluster import Case, Cluster, Network
from ramet.srt.text.tokenizer import Tokenizer
from server_process import MODEL_NAME, ServerProcess

TOLERANCE = 1e-4
DEFAULT = "find what answers"
# Of the line breaks at the end, a template loses one.
BY_ROLE = (
    "{%- set told = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first "
    "| default('" + DEFAULT + "') -%}<|im_start|>judge\n{{ told }}\n"
    "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}|"
    "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}<|im_end|>\n\n"
)
BY_PLACE = (
    "<|im_start|>judge\n{{ instruct | default('" + DEFAULT + "') }}\n"
    "{{ messages[0]['content'] }}|{{ messages[1]['content'] }}<|im_end|>\n\n"
)
WITHOUT_INSTRUCTION = BY_ROLE.replace("{{ told }}", DEFAULT)
FOR_CHATS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"
)
DOCUMENTS = ["a ramet is a plant", "  the lazy dog\n", "x", "植物は育つ", "true" * 30]
QUERY = "what grows?"
TRUE, FALSE = "b", "a"


def prompt(query: str, document: str, told: str = DEFAULT) -> str:
    return f"<|im_start|>judge\n{told}\n{query}|{document}<|im_end|>\n"


def write_template(folder: Path, template: str) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = rm.make_model(tmp_path_factory.mktemp("model"), "qwen3", num_hidden_layers=4)
    tokenizer = Tokenizer.from_path(str(folder))
    (true_id,), (false_id,) = tokenizer.encode(TRUE), tokenizer.encode(FALSE)
    rm.write_logit_score(folder, true_id, false_id)
    write_template(folder, BY_ROLE)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with ServerProcess(model, log, "--chunked-prefill-size", "32", fake=False) as process:
        yield process.wait_ready()
    assert "Traceback" not in process.output


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, of which no file says that it ranks."""
    folder = tmp_path_factory.mktemp("plain")
    for file in model.iterdir():
        if file.is_file() and file.name != "modules.json":
            (folder / file.name).symlink_to(file)
    return folder


def next_logits(model: Path, texts: list[str]) -> list[torch.Tensor]:
    tokenizer = Tokenizer.from_path(str(model))
    return [one[-1] for one in rm.hf_logprobs(model, [tokenizer.encode(text, False) for text in texts])]


def expected(model: Path, texts: list[str]) -> list[float]:
    tokenizer = Tokenizer.from_path(str(model))
    labels = [tokenizer.encode(FALSE)[0], tokenizer.encode(TRUE)[0]]
    return [float(logits[labels].softmax(-1)[1]) for logits in next_logits(model, texts)]


def scores_of(answer: httpx.Response, num: int) -> list[float]:
    """The scores in the documents' order."""
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert len(results) == num
    assert sorted(results, key=lambda one: -one["relevance_score"]) == results
    return [one["relevance_score"] for one in sorted(results, key=lambda one: one["index"])]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_rerank(http: httpx.Client, model: Path, path: str) -> None:
    wanted = expected(model, [prompt(QUERY, document) for document in DOCUMENTS])
    assert max(wanted) - min(wanted) > 0.01  # else the order says nothing
    answer = http.post(path, json={"model": MODEL_NAME, "query": QUERY, "documents": DOCUMENTS})
    assert scores_of(answer, len(DOCUMENTS)) == pytest.approx(wanted, abs=TOLERANCE)
    body = answer.json()
    assert [one["document"]["text"] for one in body["results"]] == [DOCUMENTS[one["index"]] for one in body["results"]]
    tokenizer = Tokenizer.from_path(str(model))
    num_tokens = sum(len(tokenizer.encode(prompt(QUERY, document), False)) for document in DOCUMENTS)
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert body["metadata"] == {"weight_version": "default"}
    assert body["id"].startswith("rerank-") and body["model"] == MODEL_NAME


def test_rerank_options(http: httpx.Client, model: Path) -> None:
    body = {"query": QUERY, "documents": [{"text": document} for document in DOCUMENTS]}
    whole = http.post("/v1/rerank", json=body).json()["results"]
    for top_n in (1, 3, 99):
        answer = http.post("/v1/rerank", json={**body, "top_n": top_n, "return_documents": False}).json()
        best = [{key: one[key] for key in ("index", "relevance_score")} for one in whole[:top_n]]
        assert answer["results"] == [{**one, "relevance_score": pytest.approx(one["relevance_score"])} for one in best]
    wanted = expected(model, [prompt(QUERY, document, "be strict") for document in DOCUMENTS])
    for name in ("instruct", "instruction"):
        answer = http.post("/v1/rerank", json={**body, name: "be strict"})
        assert scores_of(answer, len(DOCUMENTS)) == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.parametrize(("first", "second"), [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")])
def test_pairs(http: httpx.Client, model: Path, first: str, second: str) -> None:
    def score(queries: str | list[str], documents: str | list[str]) -> list[float]:
        answer = http.post("/v1/score", json={first: queries, second: documents, "model": MODEL_NAME})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["object"] == "list" and body["id"].startswith("score-") and body["usage"]["prompt_tokens"] > 0
        assert body["metadata"] == {"weight_version": "default"}
        assert [one["index"] for one in body["data"]] == [*range(len(body["data"]))]
        return [one["score"] for one in body["data"]]

    wanted = expected(model, [prompt(QUERY, document) for document in DOCUMENTS])
    assert score(QUERY, DOCUMENTS) == pytest.approx(wanted, abs=TOLERANCE)
    assert score([QUERY], DOCUMENTS[0]) == pytest.approx(wanted[:1], abs=TOLERANCE)
    wanted = expected(model, [prompt("a", "c"), prompt("b", "d")])
    assert score(["a", "b"], ["c", "d"]) == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.parametrize("item_first", [False, True])
def test_labels(http: httpx.Client, model: Path, item_first: bool) -> None:
    labels = [7, 300, 9]
    body = {"query": QUERY, "items": DOCUMENTS, "label_token_ids": labels, "item_first": item_first}
    texts = [document + QUERY if item_first else QUERY + document for document in DOCUMENTS]
    logits = next_logits(model, texts)
    answer = http.post("/v1/score", json=body).json()
    assert answer["object"] == "scoring" and answer["model"] == MODEL_NAME
    assert answer["metadata"] == {"weight_version": "default"}
    for scores, one in zip(answer["scores"], logits, strict=True):
        assert scores == pytest.approx(one.softmax(-1)[labels].tolist(), abs=TOLERANCE)
    answer = http.post("/v1/score", json={**body, "apply_softmax": True}).json()
    for scores, one in zip(answer["scores"], logits, strict=True):
        assert scores == pytest.approx(one[labels].softmax(-1).tolist(), abs=TOLERANCE)
        assert sum(scores) == pytest.approx(1.0)
    tokenizer = Tokenizer.from_path(str(model))
    ids = {"query": tokenizer.encode(QUERY), "items": [[5, 6], [7]], "label_token_ids": labels}
    by_ids = http.post("/v1/score", json=ids).json()["scores"]
    joined = [ids["query"] + item for item in ids["items"]]
    wanted = [one[-1].softmax(-1)[labels].tolist() for one in rm.hf_logprobs(model, joined)]
    assert by_ids == [pytest.approx(one, abs=TOLERANCE) for one in wanted]
    one = http.post("/v1/score", json={**body, "items": DOCUMENTS[0]}).json()["scores"]
    assert len(one) == 1


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/v1/rerank", {"documents": ["a"]}, "query", "query"),
        ("/v1/rerank", {"query": "a"}, "documents", "documents"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents", "documents"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query", "query"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": 0}, "top_n", "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["a", "w " * 600]}, "documents[1]", "context of 512 tokens"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "model": "other"}, "model", "does not exist"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "rank_fields": ["a"]}, "rank_fields", "rank_fields"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "instruct": "b", "instruction": "c"}, "instruction", "names"),
        ("/v1/score", {}, "query", "must be given"),
        ("/v1/score", {"queries": "a"}, "documents", "documents must be given"),
        ("/v1/score", {"query": "a", "items": ["b"]}, "label_token_ids", "must be given"),
        ("/v1/score", {"query": "a", "text_1": "b"}, "query", "different calls"),
        ("/v1/score", {"text_1": "a", "documents": "b"}, "queries", "names of the same"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1", "has 2 texts and text_2 1"),
        ("/v1/score", {"query": "a", "items": [[5]], "label_token_ids": [5]}, "items", "both be"),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [400]}, "label_token_ids", "[0, 331)"),
        ("/v1/score", {"query": "", "items": ["b", ""], "label_token_ids": [4]}, "items[1]", "must not be empty"),
        (
            "/v1/score",
            {"query": "a", "items": ["b"], "label_token_ids": [4], "instruct": "c"},
            "instruct",
            "belongs to",
        ),
        ("/v1/embeddings", {"input": "a"}, "model", "--is-embedding"),
        ("/encode", {"text": "a"}, "model", "--is-embedding"),
    ],
)
def test_bad_bodies(http: httpx.Client, path: str, body: dict, param: str, words: str) -> None:
    answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == (404 if "exist" in words else 400)
    assert error["param"] == param
    assert words in error["message"]


def test_it_generates_beside_it(http: httpx.Client, model: Path) -> None:
    prompts = rm.random_prompts([7])
    params = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = http.post("/generate", json={"input_ids": prompts[0], "sampling_params": params}).json()
    assert answer["output_ids"] == rm.hf_greedy(model, prompts, 8)[0]


@pytest.mark.parametrize(
    ("template", "takes_instruction"), [(BY_ROLE, True), (BY_PLACE, True), (WITHOUT_INSTRUCTION, False)]
)
def test_declared_by_the_operator(plain: Path, model: Path, tmp_path: Path, template: str, takes_instruction) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(template)
    flags = ["--classifier-from-token", f"{FALSE},{TRUE}", "--chat-template", str(file)]
    with ServerProcess(plain, tmp_path / "log", *flags, fake=False) as server:
        url = f"{server.wait_ready().url}/v1/rerank"
        body = {"query": QUERY, "documents": DOCUMENTS}
        wanted = expected(model, [prompt(QUERY, document) for document in DOCUMENTS])
        assert scores_of(httpx.post(url, json=body), len(DOCUMENTS)) == pytest.approx(wanted, abs=TOLERANCE)
        answer = httpx.post(url, json={**body, "instruct": "be strict"})
        if takes_instruction:
            wanted = expected(model, [prompt(QUERY, document, "be strict") for document in DOCUMENTS])
            assert scores_of(answer, len(DOCUMENTS)) == pytest.approx(wanted, abs=TOLERANCE)
        else:
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "instruction"


@pytest.mark.parametrize(
    ("labels", "template", "words"),
    [
        (None, BY_ROLE, "is no reranker"),
        (f"{FALSE},{TRUE}", FOR_CHATS, "doesn't show messages of the roles query and document"),
    ],
)
def test_other_models_rank_nothing(plain: Path, tmp_path: Path, labels: str | None, template: str, words: str) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(template)
    flags = ["--chat-template", str(file), *([] if labels is None else ["--classifier-from-token", labels])]
    with ServerProcess(plain, tmp_path / "log", *flags, fake=False) as server:
        url = server.wait_ready().url
        for path, body in (
            ("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS}),
            ("/v1/score", {"queries": QUERY, "documents": DOCUMENTS}),
        ):
            answer = httpx.post(url + path, json=body)
            assert answer.status_code == 400
            assert words in answer.json()["error"]["message"]
        labelled = {"query": "a", "items": ["b"], "label_token_ids": [5]}
        assert httpx.post(f"{url}/v1/score", json=labelled).status_code == 200  # which any decoder can answer


def test_a_label_that_is_no_token_ends_the_start(plain: Path, tmp_path: Path) -> None:
    with ServerProcess(plain, tmp_path / "log", "--classifier-from-token", "a,nothing at all", fake=False) as server:
        assert server.wait_exit() == 1
        assert "--classifier-from-token: 'nothing at all' is not one token" in server.output


@pytest.mark.parametrize("case", [Case(tp_size=2), Case(pp_size=2)], ids=["tp2", "pp2"])
def test_topologies(model: Path, tmp_path: Path, case: Case) -> None:
    wanted = expected(model, [prompt(QUERY, document) for document in DOCUMENTS])
    with Network(1) as network, Cluster(case, network.hosts, model, tmp_path) as cluster:
        cluster.wait_ready()
        status, answer = cluster.head.request("/v1/score", {"queries": QUERY, "documents": DOCUMENTS})
        assert status == 200
        assert [one["score"] for one in answer["data"]] == pytest.approx(wanted, abs=TOLERANCE)
