"""The overlapped loop gives what the plain one gives: tokens, ends, log-probabilities, and no lost page."""

import pytest
import random_models as rm
from engine_harness import EngineHarness
from ramet.srt.managers.io_struct import AbortReq

PROMPTS = rm.random_prompts([1, 5, 17, 33, 60])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama3")


@pytest.fixture(params=[{}, {"max_total_tokens": 160}, {"chunked_prefill_size": 7}, {"page_size": 1}], ids=str)
def engines(request, folder):
    return EngineHarness(folder, **request.param), EngineHarness(folder, overlap=True, **request.param)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.9, "top_p": 0.9, "sampling_seed": 3},
        {"frequency_penalty": 0.5, "repetition_penalty": 1.3, "min_new_tokens": 4},
        {"regex": "[a-z ]{3,20}", "ignore_eos": False, "sampling_seed": 1, "temperature": 0.5},
    ],
    ids=str,
)
def test_same_tokens(engines, params):
    for _ in range(2):  # the second time with a warm prefix cache
        plain, overlapped = (engine.generate(PROMPTS, max_new_tokens=14, **params) for engine in engines)
        assert [result.token_ids for result in overlapped] == [result.token_ids for result in plain]
        assert [result.finish_reason for result in overlapped] == [result.finish_reason for result in plain]


def test_a_stop_token_drops_what_was_computed_beyond_it(engines):
    full = engines[0].generate(PROMPTS, max_new_tokens=14)
    stops = [result.token_ids[5] for result in full]
    for prompt, stop, whole in zip(PROMPTS, stops, full, strict=True):
        result = engines[1].generate([prompt], max_new_tokens=14, stop_token_ids=[stop])[0]
        assert result.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
        assert result.finish_reason.matched == stop


def test_streams_every_token_once(engines):
    for index, prompt in enumerate(PROMPTS):
        engines[1].submit(str(index), prompt, max_new_tokens=9, stream=True, return_logprob=True, top=2)
    results = engines[1].run()
    for index, expected in enumerate(engines[0].generate(PROMPTS, max_new_tokens=9, return_logprob=True, top=2)):
        assert results[str(index)].token_ids == expected.token_ids
        assert results[str(index)].output_logprobs == pytest.approx(expected.output_logprobs, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_abort_while_a_pass_is_under_way(engines, steps):
    engine = engines[1]
    for index, prompt in enumerate(PROMPTS):
        engine.submit(str(index), prompt, max_new_tokens=12)
    for _ in range(steps):
        engine.step()
    engine.send(AbortReq(rid="2"))
    results = engine.run()
    assert results["2"].finish_reason.type == "abort"
    assert len([result for result in results.values() if result.finish_reason.type == "length"]) == len(PROMPTS) - 1
    assert all(len(results[str(index)].token_ids) == 12 for index in (0, 1, 3, 4))
