"""Owns the tests of latent attention in whole instances: heads and experts split, attention data-parallel, cloned.

With a sparse index, too, which chooses a few keys of each prompt, and behind the border of pipeline stages.
"""

import os

import httpx
import pytest
import random_models as rm
from generate_check import check_generate_twice
from server_process import ServerProcess

SEED = ("--remote-instance-weight-loader-start-seed-via-transfer-engine", "--engine-info-bootstrap-port", "0")
CLIENT = ("--load-format", "remote_instance", "--remote-instance-weight-loader-fallback", "error",
          "--engine-info-bootstrap-port", "0")  # fmt: skip
PROMPTS = rm.random_prompts([70, 5, 33])
NUM_TOKENS = 8
takes_long = pytest.mark.skipif(not os.environ.get("RAMET_KILLS"), reason="RAMET_KILLS is not set")


def check(server, expected, logprobs):
    assert check_generate_twice(server, PROMPTS, NUM_TOKENS, expected, logprobs) >= 64


def answers_of_transformers(folder):
    """Greedy tokens, and the log-probability of each."""
    expected = rm.hf_greedy(folder, PROMPTS, NUM_TOKENS)
    sequences = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    logprobs = [
        [rows[len(prompt) + place - 1, token].item() for place, token in enumerate(answer)]
        for rows, prompt, answer in zip(rm.hf_logprobs(folder, sequences), PROMPTS, expected, strict=True)
    ]
    return expected, logprobs


@pytest.mark.parametrize("family", ["deepseek_v3", pytest.param("deepseek_v32", marks=takes_long)])
def test_two_ranks_answer_as_transformers_and_so_does_a_clone_by_one(tmp_path, family):
    folder = rm.make_model(tmp_path / "model", family)
    expected, logprobs = answers_of_transformers(folder)
    flags = ("--tp-size", "2", "--ep-size", "2", "--enable-dp-attention", "--dp-size", "2")
    flags += ("--max-total-tokens", "1024", "--chunked-prefill-size", "24")
    with ServerProcess(folder, tmp_path / "seed.log", *flags, *SEED, fake=False) as seed:
        seed.wait_ready()
        check(seed, expected, logprobs)
        weightless = rm.without_weights(folder, tmp_path / "weightless")
        address = ("--remote-instance-weight-loader-seed-instance-ip", seed.url.removeprefix("http://"))
        one = ("--max-total-tokens", "1024", *CLIENT, *address)
        with ServerProcess(weightless, tmp_path / "client.log", *one, fake=False) as client:
            client.wait_ready()
            [rank] = httpx.get(f"{client.url}/get_server_info", timeout=10).json()["ranks"]
            assert rank["load_report"]["verified"] and rank["load_report"]["source"] == "local_copy"
            check(client, expected, logprobs)


@takes_long
def test_a_stage_without_an_index_attends_to_what_the_one_before_has_chosen(tmp_path):
    """In each stage attention is data-parallel: a rank is sent the choice of its own requests' tokens."""
    folder = rm.make_model(tmp_path / "model", "glm_moe_dsa")
    flags = ("--pp-size", "3", "--tp-size", "2", "--enable-dp-attention", "--dp-size", "2")
    flags += ("--max-total-tokens", "1024", "--chunked-prefill-size", "24")
    with ServerProcess(folder, tmp_path / "server.log", *flags, fake=False) as server:
        server.wait_ready()
        check(server, *answers_of_transformers(folder))
