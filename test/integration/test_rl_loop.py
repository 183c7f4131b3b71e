"""The example of a loop that learns does."""

import subprocess
import sys
from pathlib import Path

import pytest

LOOP = Path(__file__).resolve().parents[2] / "examples" / "rl_loop.py"


@pytest.mark.slow
def test_the_reward_rises(tmp_path: Path) -> None:
    picture = tmp_path / "curve.svg"
    command = [sys.executable, str(LOOP), "--picture", str(picture), "--log-dir", str(tmp_path / "logs")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "each step on average: publish" in result.stdout and picture.read_text().startswith("<svg")
