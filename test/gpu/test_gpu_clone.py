"""A client takes its weights from a seed's GPU memory and answers as the seed does."""

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))
from bench_common import Server, running  # noqa: E402 - its folder is made importable above

DEMO = ROOT / "examples" / "demo_model"
FLAGS = ["--device", "cuda", "--max-total-tokens", "8192", "--max-running-requests", "8"]
OFFER = "--remote-instance-weight-loader-start-seed-via-transfer-engine"
QUESTION = {"text": "What is a ramet?", "sampling_params": {"temperature": 0, "max_new_tokens": 16}}


def clone_flags(seed: Server) -> list[str]:
    prefix = "--remote-instance-weight-loader"
    return [*FLAGS, "--load-format", "remote_instance", f"{prefix}-seed-instance-ip", "127.0.0.1",
            f"{prefix}-seed-instance-service-port", str(seed.port)]  # fmt: skip


@pytest.fixture(scope="module")
def seed():
    pytest.importorskip("mooncake.engine", reason="Mooncake is not installed")
    with running(DEMO, *FLAGS, OFFER) as server:
        yield server


@pytest.mark.parametrize("mode, source", [("auto", "local_copy"), ("off", "transfer_engine")])
def test_clone(seed, mode, source):
    flags = [*clone_flags(seed), "--remote-instance-weight-loader-fallback", "error"]
    with running(DEMO, *flags, "--remote-instance-weight-loader-local-mode", mode) as client:
        report = client.rank_info()["load_report"]
        assert report["source"] == source and report["verified"]
        assert client.call("/generate", QUESTION)["text"] == seed.call("/generate", QUESTION)["text"]
        grown = [*clone_flags(client), "--remote-instance-weight-loader-fallback", "error"]
        with running(DEMO, *grown) as grandchild:
            assert grandchild.rank_info()["load_report"]["verified"]


def test_a_client_outlives_its_seed():
    pytest.importorskip("mooncake.engine", reason="Mooncake is not installed")
    with running(DEMO, *FLAGS, OFFER) as seed:
        expected = seed.call("/generate", QUESTION)["text"]
        with running(DEMO, *clone_flags(seed)) as client:
            os.kill(seed.process.pid, signal.SIGKILL)
            seed.process.wait(10)
            assert client.call("/generate", QUESTION)["text"] == expected
