"""The parts of the GPU benchmark that run on any device."""

import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))
import bench_gpu  # noqa: E402 - its folder is made importable above
from bench_common import running  # noqa: E402 - its folder is made importable above
from soak_clones import DEMO_MODEL, OFFER  # noqa: E402 - its folder is made importable above


def test_token_times_while_the_weights_are_taken(tmp_path):
    pytest.importorskip("mooncake.engine", reason="Mooncake is not installed")
    flags = ["--device", "cpu", "--max-total-tokens", "8192", "--max-running-requests", "16"]
    clones = []

    def clone():
        clones.append(time.sleep(0.05))

    with running(DEMO_MODEL, *flags, OFFER) as seed:
        times = bench_gpu.measure_token_times(seed, "cpu", 300, tmp_path, clone, output_len=16)
    assert clones
    assert set(times) == {"quiet", "cloned again and again", "weights taken all the time"}
    assert all(0 < value < 10_000 for value in times.values())
