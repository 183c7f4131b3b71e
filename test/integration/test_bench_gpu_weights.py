"""The benchmark of weights on GPUs runs through on a CPU, so that a visit to a GPU finds no mistake of its own."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmark" / "bench_gpu_weights.py"
sys.path.insert(0, str(SCRIPT.parent))
import bench_gpu_weights as bench  # noqa: E402 - its folder is made importable above


@pytest.fixture
def flags(tmp_path):
    return ["--device", "cpu", "--work-dir", str(tmp_path), "--output", str(tmp_path / "out")]


def values_in(tmp_path):
    return json.loads((tmp_path / "out").read_text())["values"]


def test_every_part(tmp_path, flags):
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    values = values_in(tmp_path)
    names = [result["what"] for result in values["results"]]
    assert len(names) == len(set(names)) == 9 and values["failures"] == {}
    without_limit = ("one bare broadcast", "`transfer_engine` over TCP")
    for result in values["results"]:
        assert result["rate"] > 0 and (result["limit"] > 0 or result["what"] in without_limit)
        assert min(result["rounds"]) <= result["rate"] <= max(result["rounds"])
    assert f"| {names[0]} |" in done.stdout


def test_parts_that_fail_or_hang_leave_the_others_alone(tmp_path, flags, monkeypatch, capsys):
    def fail(self):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(bench, "NEEDED_TOPOLOGIES", dict.fromkeys(bench.PART_TIMEOUT_S, ()))
    monkeypatch.setitem(bench.PART_TIMEOUT_S, "reshard", 0.1)
    monkeypatch.setattr(bench.Bench, "local", fail)
    monkeypatch.setattr(bench.Bench, "reshard", lambda self: time.sleep(30))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags, "--only", "local,reshard,checkpoint"])
    assert bench.main() == 1
    values = values_in(tmp_path)
    assert [result["what"] for result in values["results"]] == ["`checkpoint` from the page cache"]
    assert values["failures"] == {
        "local": "RuntimeError: no such luck",
        "reshard": "TimeoutError: not done within 0.1 s",
    }
    assert "| local | failed: RuntimeError: no such luck | |" in capsys.readouterr().out


def test_the_sweep(tmp_path, flags, monkeypatch):
    from ramet.srt.model_loader.arena import cuda_reader

    for name in ("MAX_READERS", "SLICE_BYTES"):
        monkeypatch.setattr(cuda_reader, name, getattr(cuda_reader, name))  # the sweep sets them
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags, "--sweep-checkpoint"])
    assert bench.main() == 0
    values = values_in(tmp_path)
    assert len({result["what"] for result in values["results"]}) == 9 and values["failures"] == {}


def test_the_profile(tmp_path, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags, "--profile-checkpoint"])
    assert bench.main() == 0
    values = values_in(tmp_path)
    names = [result["what"] for result in values["results"]]
    assert names == [f"load {number} of a process" for number in (1, 2, 3, 4)] and values["failures"] == {}
    output = capsys.readouterr().out
    for stage in ("read headers", "plan", "fill, all of it", "make a thread ready", "read a range", "GB/s read"):
        assert output.count(f"\n{stage} ") == 4, stage
