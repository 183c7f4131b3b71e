"""Every option of a request, and engines of odd sizes, give on a GPU the tokens that the CPU engine gives."""

import pytest
import random_models as rm
from engine_harness import EngineHarness
from ramet.srt.model_executor import cuda_graph_runner

PROMPTS = rm.random_prompts([1, 5, 17, 33, 60])
DEVICE = "cuda"
DRAWN = {"temperature": 0.9, "sampling_seed": 3}
REQUESTS = {
    "top_k": DRAWN | {"top_k": 7},
    "top_p": DRAWN | {"top_p": 0.8},
    "min_p": DRAWN | {"min_p": 0.1},
    "all limits": DRAWN | {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "repetition": {"repetition_penalty": 1.3},
    "counts": {"frequency_penalty": 0.5, "presence_penalty": 0.4},
    "bias": {"logit_bias": {7: 3.5, 11: -100.0}},
    "least length": {"min_new_tokens": 9, "stop_token_ids": [3, 4, 5], "ignore_eos": False},
    "grammar": DRAWN | {"regex": "[a-z ]{3,20}", "ignore_eos": False},
}
ENGINES = {
    "pages of 1": {"page_size": 1},
    "pages of 24": {"page_size": 24},
    "one request at a time": {"max_running_requests": 1},
    "an odd number of requests": {"max_running_requests": 3},
    "retractions": {"max_total_tokens": 160},
    "short chunks": {"chunked_prefill_size": 7},
    "no overlap": {"overlap": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama3")


def check(folder, request, engine):
    request = {"max_new_tokens": 14, "return_logprob": True, "top": 3} | request
    expected = EngineHarness(folder, device="cpu").generate(PROMPTS, **request)
    results = EngineHarness(folder, device=DEVICE, **{"overlap": True} | engine).generate(PROMPTS, **request)
    for result, right in zip(results, expected, strict=True):
        assert result.token_ids == right.token_ids and result.finish_reason == right.finish_reason
        assert result.output_logprobs == pytest.approx(right.output_logprobs, abs=1e-3)
        for top, right_top in zip(result.top_logprobs, right.top_logprobs, strict=True):
            assert top == pytest.approx(right_top, abs=1e-3)


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_options_of_requests(folder, request_):
    check(folder, request_, {})


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_engines_of_odd_sizes(folder, engine):
    check(folder, {}, engine)


def test_more_requests_than_the_largest_graph_holds(folder, monkeypatch):
    monkeypatch.setattr(cuda_graph_runner, "MAX_BATCH_SIZE", 2)
    check(folder, {}, {})


def test_requests_of_all_kinds_together(folder):
    """Rows of one batch with other options beside them, while the first pass still runs."""
    engines = [EngineHarness(folder, device="cpu"), EngineHarness(folder, device=DEVICE, overlap=True)]
    for engine in engines:
        for number, (name, options) in enumerate(REQUESTS.items()):
            engine.submit(name, PROMPTS[number % len(PROMPTS)], **({"max_new_tokens": 14} | options))
        engine.run()
    expected, results = (engine.results() for engine in engines)
    assert {name: result.token_ids for name, result in results.items()} == {
        name: result.token_ids for name, result in expected.items()
    }
