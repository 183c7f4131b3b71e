"""A seed that is cloned again and again keeps nothing of its clients; the script that watches it notices if it did."""

import http.client
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from server_process import is_running, run_script, wait_until

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmark"
sys.path.insert(0, str(BENCHMARKS))
import soak_clones  # noqa: E402 - its folder is made importable above

SAMPLE = soak_clones.Sample(host_bytes=500 << 20, num_files=70, num_threads=20, gpu_bytes=1 << 30)
CLONE = {"first_answer_s": 1.0, "answer": [1, 2], "source": "local_copy", "verified": True}
QUIET = SimpleNamespace(errors=[], seconds=[0.1])


def test_a_seed_under_load_does_not_grow(tmp_path):
    flags = [
        "--minutes",
        "1",
        "--clones",
        "12",
        "--every",
        "0",
        "--warm-up",
        "4",
        "--concurrency",
        "1",
        "--without-engine",
    ]
    command = [sys.executable, BENCHMARKS / "soak_clones.py", "--device", "cpu", "--local-mode", "copy", *flags,
               "--output", tmp_path / "out"]  # fmt: skip
    done = run_script(command, timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads((tmp_path / "out").read_text())["values"]
    assert [clone["source"] for clone in values["clones"]] == 12 * ["local_copy"]
    assert all(sample["num_files"] > 10 and sample["host_bytes"] > 1 << 20 for sample in values["samples"])


@pytest.mark.parametrize("name", ["host_bytes", "num_files", "num_threads", "gpu_bytes"])
def test_what_grows_with_each_clone_is_found(name):
    step = getattr(soak_clones.BOUNDS, name) // 4
    samples = [replace(SAMPLE, **{name: getattr(SAMPLE, name) + step * i}) for i in range(12)]
    (fault,) = soak_clones.find_faults([1, 2], 12 * [CLONE], samples, QUIET, warm_up=3)
    assert fault.startswith(f"{name} has grown by {step * 8}")


def test_growth_before_and_noise_after_the_warm_up_are_none():
    samples = [replace(SAMPLE, host_bytes=(i << 28)) for i in range(3)] + [
        SAMPLE,
        replace(SAMPLE, num_files=99),
        SAMPLE,
    ]
    assert soak_clones.find_faults([1, 2], 6 * [CLONE], samples, QUIET, warm_up=3) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": [1, 3]}, "clone 4: other tokens than the seed's"),
        ({"source": "checkpoint"}, "clone 4: from checkpoint, verified: True"),
        ({"verified": False}, "clone 4: from local_copy, verified: False"),
    ],
)
def test_a_clone_that_is_not_right_is_found(change, message):
    clones = [*(4 * [CLONE]), CLONE | change, CLONE]
    assert soak_clones.find_faults([1, 2], clones, 6 * [SAMPLE], QUIET, warm_up=3) == [message]


def test_what_a_script_has_started_ends_with_it_when_its_time_is_over(tmp_path):
    file = tmp_path / "child"
    with pytest.raises(subprocess.TimeoutExpired):
        run_script(["sh", "-c", f"sleep 100 & echo $! > {file}; wait"], timeout_s=2)
    wait_until(lambda: not is_running(int(file.read_text())), "the child's end")


def test_processes_that_end_meanwhile_do_not_count(monkeypatch):
    ended = subprocess.Popen(["true"])
    ended.wait()
    pipe = subprocess.PIPE
    with subprocess.Popen(["true"]) as zombie, subprocess.Popen(["cat"], stdin=pipe, stdout=pipe) as idle:
        idle.stdin.write(b"\n")
        idle.stdin.flush()
        idle.stdout.read(1)  # from here on it opens nothing
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # has ended, and is not taken away
        monkeypatch.setattr(soak_clones, "process_tree", lambda root: [root])
        alone = soak_clones.take_sample(idle.pid, None)
        monkeypatch.setattr(soak_clones, "process_tree", lambda root: [root, ended.pid, zombie.pid])
        beside = soak_clones.take_sample(idle.pid, None)
    assert (beside.num_threads, beside.num_files) == (alone.num_threads, alone.num_files) and beside.host_bytes > 0


class FakeSeed:
    """Answers its own questions, and breaks off those of the load."""

    process = SimpleNamespace(pid=os.getpid())
    port = 0

    def __init__(self, *_):
        self.ended = False

    def call(self, path, body, timeout_s=0.0):
        if body is soak_clones.LOAD:
            raise http.client.IncompleteRead(b"")
        return {"output_ids": [1]}

    def stop(self):
        self.ended = True


def test_no_clone_in_time_and_a_broken_answer_are_faults(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(soak_clones, "Server", FakeSeed)
    flags = ["--device", "cpu", "--minutes", "0", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["soak_clones.py", *flags])
    assert soak_clones.main() == 1
    faults = json.loads((tmp_path / "out").read_text())["values"]["faults"]
    assert "only 0 clones: nothing can be said about growth" in faults
    assert any("IncompleteRead" in fault for fault in faults)
