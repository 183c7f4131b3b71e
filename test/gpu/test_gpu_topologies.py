"""Tensor and pipeline parallelism over two GPUs give the tokens that transformers gives."""

import sys
from pathlib import Path

import pytest
import random_models as rm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmark"))
from bench_common import running  # noqa: E402 - its folder is made importable above

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PROMPTS = rm.random_prompts([5, 33, 60])


@pytest.mark.parametrize("flags", [["--tp-size", "2"], ["--pp-size", "2"], ["--tp-size", "2", "--disable-cuda-graph"]])
def test_greedy_tokens_equal_transformers(tmp_path, flags):
    folder = rm.make_model(tmp_path, "llama3", num_hidden_layers=4)
    common = ["--device", "cuda", "--max-total-tokens", "4096", "--max-running-requests", "8"]
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    with running(folder, *common, *flags) as server:
        answers = server.call("/generate", {"input_ids": PROMPTS, "sampling_params": sampling})
    assert [answer["output_ids"] for answer in answers] == rm.hf_greedy(folder, PROMPTS, 12)
