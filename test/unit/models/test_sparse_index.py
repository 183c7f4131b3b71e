"""Owns the test that what a sparse index leaves out shows, and that nothing else of it does."""

import json

import pytest
import random_models as rm
import torch
from engine_harness import EngineHarness
from rank_threads import RankThreads, stage_logprobs

SEQUENCES = rm.random_prompts([12, 60], seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("glm"), "glm_moe_dsa", index_topk=12)


def with_top_k(folder, target, top_k):
    """The same weights with another number of keys that are chosen."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config | {"index_topk": top_k}))
    return target


def test_who_sees_no_more_than_are_chosen_sees_all(monkeypatch, folder, tmp_path):
    """As long as a sequence is that short its answer is that without an index; behind that, it is another."""
    few = RankThreads(monkeypatch, folder, 1).logprobs(SEQUENCES, 64)
    all_ = RankThreads(monkeypatch, with_top_k(folder, tmp_path / "all", 500), 1).logprobs(SEQUENCES, 64)
    torch.testing.assert_close(few[0], all_[0], atol=0, rtol=0)
    torch.testing.assert_close(few[1][:12], all_[1][:12], atol=2e-5, rtol=1e-5)
    differences = (few[1] - all_[1]).abs().amax(-1)
    assert differences[14:].min() > 1e-3 and differences[:12].max() < 1e-3


@pytest.mark.parametrize("place", [0, 1])
def test_a_border_between_stages_is_crossed_with_and_without_a_choice(monkeypatch, folder, place):
    """The last of three layers attends to what the second one has chosen, in another stage."""
    expected = rm.hf_logprobs(folder, SEQUENCES)[place]
    got = stage_logprobs(monkeypatch, folder, 3, SEQUENCES[place])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_a_long_prompt_again_beside_others(folder):
    """The index's keys of cached pages count as those that are computed: in one pass with chunks and single tokens."""
    prompts = rm.random_prompts([70, 9, 33, 150], seed=5)
    expected = rm.hf_greedy(folder, prompts, 5)
    engine = EngineHarness(folder, device="cpu", chunked_prefill_size=20, page_size=4)
    for _ in range(2):
        engine.channel.outputs.clear()
        results = engine.generate(prompts, max_new_tokens=5)
        assert [result.token_ids for result in results] == expected
    assert results[3].cached_tokens == 148


def test_in_half_precision_a_choice_is_made_and_shared_between_stages(monkeypatch, tmp_path):
    """As two numbers of the hidden states' type for each slot."""
    folder = rm.make_model(tmp_path, "glm_moe_dsa", dtype="bfloat16")
    got = stage_logprobs(monkeypatch, folder, 3, SEQUENCES[1])
    [wanted] = RankThreads(monkeypatch, folder, 1).logprobs(SEQUENCES[1:], 64)
    torch.testing.assert_close(got, wanted, atol=0.1, rtol=0.05)
