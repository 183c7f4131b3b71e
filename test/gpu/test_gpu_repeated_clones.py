"""A seed on a GPU keeps nothing of the clients that have taken its weights. Minutes long: benchmark/soak_clones.py."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmark" / "soak_clones.py"


@pytest.mark.parametrize(
    "flags",
    [["--clones", "5", "--warm-up", "2"], ["--clones", "40", "--warm-up", "10", "--without-engine"]],
    ids=["engines", "weights"],
)
def test_a_seed_under_load_does_not_grow(flags):
    pytest.importorskip("mooncake.engine", reason="Mooncake is not installed")
    command = [sys.executable, SCRIPT, "--device", "cuda", "--every", "0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
