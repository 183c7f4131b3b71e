"""A client on one GPU gets the weights of a seed on another one by NCCL broadcast, and both go on serving."""

import sys
from pathlib import Path

import pytest
import random_models as rm
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))
from bench_common import running  # noqa: E402 - its folder is made importable above

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
FLAGS = ["--device", "cuda", "--max-total-tokens", "8192", "--max-running-requests", "8"]
OFFER = "--remote-instance-weight-loader-start-seed-via-transfer-engine"
PROMPTS = rm.random_prompts([5, 33])


def answers(server):
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    outputs = server.call("/generate", {"input_ids": PROMPTS, "sampling_params": sampling})
    return [output["output_ids"] for output in outputs]


def test_weights_by_nccl(tmp_path):
    pytest.importorskip("mooncake.engine", reason="Mooncake is not installed")
    folder = rm.make_model(tmp_path, "llama3", dtype="bfloat16", num_hidden_layers=4)
    prefix = "--remote-instance-weight-loader"
    with running(folder, *FLAGS, OFFER) as seed:
        expected = answers(seed)
        flags = ["--load-format", "remote_instance", f"{prefix}-seed-instance-ip", f"127.0.0.1:{seed.port}"]
        flags += [f"{prefix}-backend", "nccl", f"{prefix}-local-mode", "off", f"{prefix}-fallback", "error"]
        with running(folder, *FLAGS, "--base-gpu-id", "1", *flags) as client:
            report = client.rank_info()["load_report"]
            assert report["source"] == "nccl" and report["verified"]
            assert answers(client) == expected == answers(seed)
