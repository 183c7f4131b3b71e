"""Owns the test of linear layers in whole instances: heads and stages split, attention data-parallel, cloned."""

import httpx
import pytest
import random_models as rm
from generate_check import check_generate_twice
from server_process import ServerProcess

SEED = ("--remote-instance-weight-loader-start-seed-via-transfer-engine", "--engine-info-bootstrap-port", "0")
CLIENT = ("--load-format", "remote_instance", "--remote-instance-weight-loader-fallback", "error",
          "--engine-info-bootstrap-port", "0")  # fmt: skip
PROMPTS = rm.random_prompts([150, 5, 33])  # a long one among short ones
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = rm.make_model(tmp_path_factory.mktemp("qwen3_next"), "qwen3_next", num_hidden_layers=4, layer_types=[
        "linear_attention", "full_attention", "linear_attention", "linear_attention"])  # fmt: skip
    expected = rm.hf_greedy(folder, PROMPTS, NUM_TOKENS)
    sequences = [prompt + answer for prompt, answer in zip(PROMPTS, expected, strict=True)]
    logprobs = [
        [rows[len(prompt) + place - 1, token].item() for place, token in enumerate(answer)]
        for rows, prompt, answer in zip(rm.hf_logprobs(folder, sequences), PROMPTS, expected, strict=True)
    ]
    return folder, expected, logprobs


def check(server, expected, logprobs):
    assert check_generate_twice(server, PROMPTS, NUM_TOKENS, expected, logprobs) == 144


def test_two_attention_groups_answer_as_transformers_and_so_does_a_clone_by_one_rank(tmp_path, model):
    folder, expected, logprobs = model
    flags = ("--tp-size", "2", "--ep-size", "2", "--enable-dp-attention", "--dp-size", "2")
    flags += ("--max-total-tokens", "1024", "--chunked-prefill-size", "24")
    with ServerProcess(folder, tmp_path / "seed.log", *flags, *SEED, fake=False) as seed:
        seed.wait_ready()
        check(seed, expected, logprobs)
        weightless = rm.without_weights(folder, tmp_path / "weightless")
        address = ("--remote-instance-weight-loader-seed-instance-ip", seed.url.removeprefix("http://"))
        one = ("--max-total-tokens", "1024", "--max-mamba-cache-size", "5", *CLIENT, *address)
        with ServerProcess(weightless, tmp_path / "client.log", *one, fake=False) as client:
            client.wait_ready()
            [rank] = httpx.get(f"{client.url}/get_server_info", timeout=10).json()["ranks"]
            assert rank["load_report"]["verified"] and rank["load_report"]["source"] == "local_copy"
            check(client, expected, logprobs)


def test_stages_keep_their_own_states(tmp_path, model):
    folder, expected, logprobs = model
    flags = ("--pp-size", "2", "--max-total-tokens", "1024", "--chunked-prefill-size", "24")
    with ServerProcess(folder, tmp_path / "server.log", *flags, fake=False) as server:
        server.wait_ready()
        check(server, expected, logprobs)
