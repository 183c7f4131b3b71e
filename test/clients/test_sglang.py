"""SGLang's own programs: its serving benchmark with every backend that it has for such servers, its language."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clients import api_checks as expect
from clients.client_run import ClientRun, run_driver
from clients.conftest import FLOW, PlainAnswers
from clients.sglang_bench import NUM_PROMPTS, OUTPUT_LEN, run_sglang_bench
from server_process import ServerProcess

BENCH_RUNS: dict[str, tuple[str, ...]] = {
    "sglang": ("sglang",),
    "sglang-native": ("sglang-native",),
    "sglang-oai": ("sglang-oai",),
    "sglang-oai-chat": ("sglang-oai-chat",),
    "vllm": ("vllm",),
    "vllm-chat": ("vllm-chat",),
    "sglang, log-probabilities": ("sglang", "--return-logprob", "--top-logprobs-num", "2"),
    "sglang, whole answers, ids": ("sglang", "--disable-stream", "--tokenize-prompt"),
    "sglang-oai, whole answers": ("sglang-oai", "--disable-stream"),
    "sglang-oai-chat, cache report": ("sglang-oai-chat", "--cache-report"),
    "sglang, flushed cache": ("sglang", "--flush-cache"),
}


@pytest.mark.parametrize("run", BENCH_RUNS)
def test_bench(run: str, server: ServerProcess, model: Path, record_property: Callable[..., None]) -> None:
    record_property("client", "sglang_bench")
    record_property("step", run)
    backend, *flags = BENCH_RUNS[run]
    record = run_sglang_bench(server.url, model, backend, run.replace(", ", "_").replace(" ", "_"), *flags)
    assert not any(record["errors"]), record["errors"]
    assert record["completed"] == NUM_PROMPTS
    assert record["total_output_tokens"] == NUM_PROMPTS * OUTPUT_LEN
    texts = record["generated_texts"]
    assert all(ttft > 0 for ttft, text in zip(record["ttfts"], texts, strict=True) if text)
    assert len(texts) == NUM_PROMPTS
    assert any(texts)  # a text of special tokens alone is empty


def gen(saw: Any, plain: PlainAnswers) -> None:
    assert saw["text"] == plain.completion


def gen_roles(saw: Any, plain: PlainAnswers) -> None:
    """Its default chat format is its own text, not this model's: what counts is that both answers are there."""
    assert len(saw["texts"]) == 2
    assert all(saw["texts"])


def gen_options(saw: Any, plain: PlainAnswers) -> None:
    gen(saw, plain)
    assert "".join(saw["input"]) == FLOW["prompt"]
    assert plain.completion in {"".join(saw["output"]), "".join(saw["output"][:-1])}
    assert set(saw["num_tops"]) == {2}


def gen_all(saw: Any, plain: PlainAnswers) -> None:
    assert saw["texts"] == [plain.completion] * 3


def gen_three(saw: Any, plain: PlainAnswers) -> None:
    assert len(saw["texts"]) == 3
    assert all(saw["texts"])


def gen_stop(saw: Any, plain: PlainAnswers) -> None:
    assert saw["text"] == plain.completion.partition(" of")[0] != plain.completion


def gen_regex(saw: Any, plain: PlainAnswers) -> None:
    plant, number = saw["text"].split(" ")
    assert plant in {"oak", "fern", "moss"}
    assert 0 <= int(number) <= 99


def gen_json(saw: Any, plain: PlainAnswers) -> None:
    expect.plant({"object": json.loads(saw["text"])}, plain)


def gen_types(saw: Any, plain: PlainAnswers) -> None:
    assert int(saw["number"]) is not None
    assert saw["truth"] in {"True", "False"}


def chosen(saw: Any, plain: PlainAnswers) -> None:
    """What the model goes on with by itself."""
    assert saw.get("choice", saw.get("text")) == " clonal colony"


def server_info(saw: Any, plain: PlainAnswers) -> None:
    assert "model_path" in saw


STEPS: dict[str, Callable[[Any, PlainAnswers], None]] = {
    "gen": gen,
    "gen_roles": gen_roles,
    "gen_stream": gen,
    "gen_stream_async": gen,
    "gen_batch": gen_all,
    "gen_options": gen_options,
    "gen_stop": gen_stop,
    "gen_regex": gen_regex,
    "gen_json": gen_json,
    "gen_types": gen_types,
    "gen_choices": chosen,
    "select_token_length_normalized": chosen,
    "select_greedy_token": chosen,
    "select_unconditional": chosen,
    "fork": gen_all,
    "prefix_cached": gen_three,
    "server_info": server_info,
}


@pytest.fixture(scope="module")
def frontend(server: ServerProcess) -> ClientRun:
    return run_driver("sglang_frontend.py", "sglang", server.url)


@pytest.mark.parametrize("step", STEPS)
def test_language(step: str, frontend: ClientRun, plain: PlainAnswers, record_property: Callable[..., None]) -> None:
    record_property("client", "sglang_frontend")
    record_property("step", step)
    STEPS[step](frontend.saw(step), plain)


def test_each_step_has_a_check(frontend: ClientRun) -> None:
    assert set(frontend.lines) == set(STEPS)
