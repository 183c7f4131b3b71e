"""The benchmark of weights on GPUs runs through on a CPU, so that a visit to a GPU finds no mistake of its own."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmark" / "bench_gpu_weights.py"


def run(tmp_path, *flags):
    command = [sys.executable, SCRIPT, "--device", "cpu", "--work-dir", tmp_path, "--output", tmp_path / "out", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_every_part(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads((tmp_path / "out").read_text())["values"]
    names = [result["what"] for result in values["results"]]
    assert len(names) == len(set(names)) == 9 and values["failures"] == {}
    assert all(result["rate"] > 0 for result in values["results"])
    assert all(result["limit"] > 0 for result in values["results"] if "bare" not in result["what"]
               and "TCP" not in result["what"])  # fmt: skip
    assert f"| {names[0]} |" in done.stdout


def test_a_part_that_fails_leaves_the_others_alone(tmp_path):
    # A folder stands where the checkpoint's file is to be.
    (tmp_path / "model-cpu-2-layers" / "model-00001-of-00008.safetensors").mkdir(parents=True)
    done = run(tmp_path, "--only", "checkpoint,local")
    assert done.returncode == 1
    values = json.loads((tmp_path / "out").read_text())["values"]
    assert len(values["results"]) == 2 and list(values["failures"]) == ["checkpoint"]


def test_the_sweep(tmp_path):
    done = run(tmp_path, "--sweep-checkpoint")
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads((tmp_path / "out").read_text())["values"]
    assert len({result["what"] for result in values["results"]}) == 18 and values["failures"] == {}
