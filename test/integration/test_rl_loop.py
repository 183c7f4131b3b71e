"""The example of a loop that learns runs, and learns where it is given the time: RL_STEPS=30."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOOP = Path(__file__).resolve().parents[2] / "examples" / "rl_loop.py"
NUM_STEPS = int(os.environ.get("RL_STEPS", "3"))
LEARNS_IN = 20  # steps


@pytest.mark.timeout(120 + 20 * NUM_STEPS)
def test_each_step_is_taken_by_both_instances(tmp_path: Path) -> None:
    picture = tmp_path / "curve.svg"
    command = [sys.executable, str(LOOP), "--picture", str(picture), "--log-dir", str(tmp_path / "logs")]
    command += ["--steps", str(NUM_STEPS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    said = result.stdout + result.stderr
    assert "mean reward" in result.stdout, said
    assert result.returncode == 0 or NUM_STEPS < LEARNS_IN, said
    assert "each step on average: publish" in result.stdout and picture.read_text().startswith("<svg")
