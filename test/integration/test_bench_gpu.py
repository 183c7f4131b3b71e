"""The parts of the GPU benchmark that run on any device."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))
import bench_gpu  # noqa: E402
from bench_common import running  # noqa: E402
from soak_clones import DEMO_MODEL, OFFER  # noqa: E402


def test_token_times_while_the_weights_are_taken(tmp_path):
    pytest.importorskip("mooncake.engine", reason="Mooncake is not installed")
    flags = ["--device", "cpu", "--max-total-tokens", "8192", "--max-running-requests", "16"]
    with running(DEMO_MODEL, *flags, OFFER) as seed:
        taken = bench_gpu.measure_taking(seed, "cpu", 300, tmp_path, output_len=16)
    assert taken["count"] > 0 and taken["quiet"] > 0 and taken["busy"] > 0
