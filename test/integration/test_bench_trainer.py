"""The benchmark of a trainer's weights runs through on a CPU, so that a visit to GPUs finds no mistake of its own."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmark" / "bench_trainer.py"


def test_every_part(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--device", "cpu", "--work-dir", tmp_path, "--output", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out").read_text())["values"]["rows"]
    assert len({row["what"] for row in rows}) == len(rows) == 8 and all(row["value"] > 0 for row in rows)
    assert [row["unit"] for row in rows] == ["ms"] * 2 + ["GB/s"] * 6
    refused = subprocess.run([*command, "--only", "plan,push"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "unknown parts push" in refused.stderr
