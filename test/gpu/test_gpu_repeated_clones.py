"""A seed on a GPU keeps nothing of the clients that have taken its weights. Minutes long: benchmark/soak_clones.py."""

import sys
from pathlib import Path

import pytest
from server_process import run_script

SCRIPT = Path(__file__).resolve().parents[2] / "benchmark" / "soak_clones.py"


@pytest.mark.parametrize(
    "flags",
    [["--clones", "5", "--warm-up", "2"], ["--clones", "40", "--warm-up", "10", "--without-engine"]],
    ids=["engines", "weights"],
)
def test_a_seed_under_load_does_not_grow(flags):
    pytest.importorskip("mooncake.engine", reason="Mooncake is not installed")
    command = [sys.executable, SCRIPT, "--device", "cuda", "--minutes", "2.5", "--every", "0", *flags]
    done = run_script(command, timeout_s=250)
    assert done.returncode == 0, done.stdout + done.stderr
