"""A standby on a GPU: memory that comes and goes with its models, graphs that stay, and tokens as of fresh starts."""

import os
import signal
import sys
from pathlib import Path

import httpx
import pytest
import random_models as rm
import torch
from server_process import wait_until
from standby_process import StandbyProcess, newest
from updated_servers import GREEDY, PROMPT, ranks_of, tokens

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))
from bench_common import running  # noqa: E402 - its folder is made importable above

FEW = ("--max-total-tokens", "8192", "--max-running-requests", "8")
OFFER = "--remote-instance-weight-loader-start-seed-via-transfer-engine"
SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
IDLE_NBYTES = 1_000_000_000


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "a": rm.make_model(folder / "a", "llama3", dtype="bfloat16", seed=0, **SHAPE),
        "b": rm.make_model(folder / "b", "qwen3", dtype="bfloat16", seed=1, **SHAPE),
    }


@pytest.fixture(scope="module")
def expected(models):
    """By fresh starts."""
    found = {}
    for name, folder in models.items():
        with running(folder, "--device", "cuda", *FEW) as server:
            body = {"input_ids": PROMPT, "sampling_params": GREEDY}
            found[name] = server.call("/generate", body)["output_ids"]
    return found


class GpuStandby(StandbyProcess):
    """Whose processes are on the first GPU."""

    def __init__(self, log, *flags):
        self._start(["-m", "ramet.cli", "standby", "--device", "cuda", "--port", "0", *FEW, *flags], log, True, {})


def used_nbytes():
    free, total = torch.cuda.mem_get_info(0)
    return total - free


def test_ten_changes_give_the_tokens_of_fresh_starts_and_keep_no_memory(models, expected, tmp_path):
    torch.zeros(1, device="cuda")
    before = used_nbytes()
    with GpuStandby(tmp_path / "log") as standby:
        standby.wait_warm()
        assert used_nbytes() - before < IDLE_NBYTES
        sizes = []
        for _ in range(5):
            for name in "ab":
                standby.become(models[name])
                assert tokens(standby) == expected[name]
            standby.become(None)
            standby.wait_warm()
            sizes.append(used_nbytes())
        assert sizes[-1] - sizes[1] < 64 << 20, sizes


def test_what_it_has_been_is_there_again_with_its_graphs(models, expected, tmp_path):
    with GpuStandby(tmp_path / "log") as standby:
        standby.wait_warm().become(models["a"])
        ranks = set(ranks_of(standby))
        standby.become(models["b"])
        outcome = standby.become(models["a"])
        assert outcome["way"] == "kept" and ranks & set(ranks_of(standby))
        assert not any("graphs" in phase for phase in outcome["phases_ms"])
        assert tokens(standby) == expected["a"]


def test_a_prepared_shape_needs_its_bytes_alone(models, expected, tmp_path):
    with GpuStandby(tmp_path / "log", "--shapes", str(models["b"])) as standby:
        outcome = standby.wait_warm().become(models["b"])
        assert outcome["way"] == "kept" and tokens(standby) == expected["b"]


def test_from_a_seed_on_the_same_gpu_and_without_one_that_was_killed(models, expected, tmp_path):
    pytest.importorskip("mooncake.engine", reason="Mooncake is not installed")
    with running(models["a"], "--device", "cuda", *FEW, OFFER) as seed, GpuStandby(tmp_path / "log") as standby:
        address = seed.url.removeprefix("http://")
        outcome = standby.wait_warm().become(models["a"], source="instance", seed=address)
        assert outcome["source"] == "local_copy" and tokens(standby) == expected["a"]
        standby.become(models["b"])
        outcome = standby.become(models["a"], source="instance", seed=address)
        assert outcome["way"] == "kept" and tokens(standby) == expected["a"]
        standby.become(models["b"])
        os.kill(seed.process.pid, signal.SIGKILL)
        answer = standby.ask(models["a"], source="instance", seed=address)
        assert answer.status_code == 400 and tokens(standby) == expected["b"]


def test_a_rank_that_is_killed_while_it_captures_leaves_what_served(models, expected, tmp_path):
    with GpuStandby(tmp_path / "log") as standby:
        standby.wait_warm().become(models["a"])
        spare = newest(ranks_of(standby.wait_warm()))
        os.kill(spare, signal.SIGSTOP)
        with httpx.Client(timeout=1) as client, pytest.raises(httpx.TimeoutException):
            client.post(f"{standby.url}/become", json={"model_path": str(models["b"])})
        wait_until(lambda: standby.state["state"] == "becoming", "that it changes")
        os.kill(spare, signal.SIGKILL)
        wait_until(lambda: standby.state["state"] == "serving", "that it is as it was")
        assert tokens(standby) == expected["a"]
