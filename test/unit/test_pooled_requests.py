"""Requests that generate nothing: hidden states and label log-probabilities of last tokens, as of transformers."""

from pathlib import Path

import numpy as np
import pytest
import random_models as rm
import torch
from engine_harness import EngineHarness
from ramet.srt.batch.batch_plan import Pooling
from ramet.srt.managers.io_struct import AbortReq

LENGTHS = [1, 2, 4, 5, 31, 64, 200]
PROMPTS = rm.random_prompts(LENGTHS)
TOLERANCE = 1e-4
CHUNKS = {"whole": {"chunked_prefill_size": -1}, "chunked": {"chunked_prefill_size": 16}}


@pytest.fixture(scope="module")
def embedding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rm.make_embedding_model(tmp_path_factory.mktemp("embedding"))


@pytest.fixture(scope="module")
def states(embedding_model: Path) -> list[torch.Tensor]:
    return rm.hf_hidden_states(embedding_model, PROMPTS)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rm.make_model(tmp_path_factory.mktemp("decoder"), "qwen3")


@pytest.fixture(scope="module")
def logprobs(decoder: Path) -> list[torch.Tensor]:
    return [whole[-1] for whole in rm.hf_logprobs(decoder, PROMPTS)]


def pool(harness: EngineHarness, pooling: Pooling, prompts: list[list[int]] = PROMPTS) -> list[np.ndarray]:
    return [result.vector for result in harness.generate(prompts, pooling=pooling)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_embeddings_are_those_of_transformers(embedding_model: Path, states, chunks: str, overlap: bool) -> None:
    harness = EngineHarness(embedding_model, overlap=overlap, **CHUNKS[chunks])
    harness.scheduler.warm_up()
    for _ in range(2):  # the second time most of each prompt comes from the prefix cache
        results = harness.generate(PROMPTS, pooling=Pooling(normalize=True))
        for result, state in zip(results, states, strict=True):
            assert result.finish_reason is not None and result.finish_reason.type == "stop"
            assert result.token_ids == []
            expected = torch.nn.functional.normalize(state, dim=-1).numpy()
            np.testing.assert_allclose(result.vector, expected, atol=TOLERANCE)
    assert results[-1].cached_tokens > 100
    for result, state in zip(pool(harness, Pooling()), states, strict=True):
        np.testing.assert_allclose(result, state.numpy(), atol=10 * TOLERANCE)
    for result, state in zip(pool(harness, Pooling(dimensions=24, normalize=True)), states, strict=True):
        expected = torch.nn.functional.normalize(state[:24], dim=-1).numpy()
        np.testing.assert_allclose(result, expected, atol=TOLERANCE)
        assert np.linalg.norm(result) == pytest.approx(1.0)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_labels_beside_generation(decoder: Path, logprobs, chunks: str, overlap: bool) -> None:
    harness = EngineHarness(decoder, overlap=overlap, **CHUNKS[chunks])
    labels = [[7], [300, 5, 330], *[[number, 9] for number in range(len(PROMPTS) - 2)]]
    alone = harness.generate(PROMPTS[3:5], max_new_tokens=12)
    harness.channel.outputs.clear()
    for index, prompt in enumerate(PROMPTS[3:5]):
        harness.submit(f"g{index}", prompt, max_new_tokens=12)
    harness.step()  # they decode when the others come
    for index, (prompt, ids) in enumerate(zip(PROMPTS, labels, strict=True)):
        harness.submit(str(index), prompt, pooling=Pooling(label_token_ids=ids))
    results = harness.run()
    assert [results[f"g{index}"].token_ids for index in range(2)] == [one.token_ids for one in alone]
    for index, ids in enumerate(labels):
        np.testing.assert_allclose(results[str(index)].vector, logprobs[index][ids].numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("overlap", [False, True])
def test_pooled_requests_share_too_small_a_cache(embedding_model: Path, states, overlap: bool) -> None:
    """Several wait for room that only others' ends make, and prompts fill the whole cache."""
    harness = EngineHarness(
        embedding_model, overlap=overlap, max_total_tokens=200, max_running_requests=3, chunked_prefill_size=48
    )
    assert harness.runner.max_req_len == 200 == len(PROMPTS[-1])
    results = harness.generate(PROMPTS * 3, pooling=Pooling(normalize=True))
    for result, state in zip(results, states * 3, strict=True):
        expected = torch.nn.functional.normalize(state, dim=-1).numpy()
        np.testing.assert_allclose(result.vector, expected, atol=TOLERANCE)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 14])
def test_abort(embedding_model: Path, overlap: bool, num_steps: int) -> None:
    """Waiting, in progress, under way or over: it ends once, and no page is lost."""
    harness = EngineHarness(embedding_model, overlap=overlap, chunked_prefill_size=16)
    harness.submit("gone", PROMPTS[-1], pooling=Pooling())
    for _ in range(num_steps):
        harness.step()
    harness.send(AbortReq(rid="gone"))
    harness.submit("kept", PROMPTS[2], pooling=Pooling())
    results = harness.run()
    assert results["gone"].finish_reason.type == ("abort" if num_steps < 13 else "stop")
    assert results["kept"].finish_reason.type == "stop"
    assert len(harness.channel.outputs) == 2


def test_what_does_not_fit_is_refused(embedding_model: Path) -> None:
    harness = EngineHarness(embedding_model, max_total_tokens=64)
    harness.submit("long", PROMPTS[-1], pooling=Pooling())
    reason = harness.run()["long"].finish_reason
    assert (reason.type, reason.status_code) == ("abort", 400)
    assert harness.channel.outputs[0].is_pooled  # else the tokenizer manager would never hear of it


def test_numbers_that_are_not_finite_are_an_error(embedding_model: Path) -> None:
    harness = EngineHarness(embedding_model)
    with torch.inference_mode():
        harness.runner.model.model.norm.weight.fill_(float("inf"))
    (result,) = harness.generate([PROMPTS[1]], pooling=Pooling(normalize=True))
    assert result.finish_reason.status_code == 500
    assert "not finite" in result.finish_reason.message


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_with_an_output_head_embeds_without_it(tmp_path: Path, decoder: Path, tied: bool) -> None:
    folder = rm.make_model(tmp_path / "model", "qwen3", tie_word_embeddings=tied)
    harness = EngineHarness(folder, is_embedding=True)
    assert not any("lm_head" in name for name, _ in harness.runner.model.named_parameters())
    (state,) = rm.hf_hidden_states(folder, PROMPTS[3:4])
    (vector,) = pool(harness, Pooling(), PROMPTS[3:4])
    np.testing.assert_allclose(vector, state.numpy(), atol=10 * TOLERANCE)
