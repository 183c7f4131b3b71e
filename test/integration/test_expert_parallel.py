"""Owns the test that experts split over processes give the tokens of transformers."""

import httpx
import pytest
import random_models as rm
from server_process import ServerProcess

PROMPTS = rm.random_prompts([1, 33, 60])
NUM_TOKENS = 10


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("qwen3_moe", ("--tp-size", "2", "--ep-size", "2")),
        ("mixtral", ("--tensor-parallel-size", "4", "--expert-parallel-size", "2")),
    ],
)
def test_greedy_tokens_equal_transformers(tmp_path, family, flags):
    folder = rm.make_model(tmp_path / "model", family)
    expected = rm.hf_greedy(folder, PROMPTS, NUM_TOKENS)
    sampling = {"max_new_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    with ServerProcess(folder, tmp_path / "log", "--max-total-tokens", "1024", *flags, fake=False) as server:
        server.wait_ready()
        body = {"input_ids": PROMPTS, "sampling_params": sampling}
        answers = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
    assert [answer["output_ids"] for answer in answers] == expected


def test_experts_that_do_not_split_are_refused_before_anything_starts(tmp_path):
    folder = rm.make_config(tmp_path / "model", "qwen3_moe")
    rm.write_tokenizer(folder)
    with ServerProcess(folder, tmp_path / "log", "--tp-size", "4", "--ep-size", "4", fake=False) as server:
        assert server.wait_exit() == 1
        assert "--ep-size 4 does not divide the model's 6 experts" in server.output
