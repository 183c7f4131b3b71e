"""A seed that is cloned again and again keeps nothing of its clients; the script that watches it notices if it did."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmark"
sys.path.insert(0, str(BENCHMARKS))
import soak_clones  # noqa: E402

SAMPLE = soak_clones.Sample(host_bytes=500 << 20, num_files=70, num_threads=20, gpu_bytes=1 << 30)
CLONE = {"first_answer_s": 1.0, "answer": [1, 2], "source": "local_copy", "verified": True}
QUIET = SimpleNamespace(errors=[], seconds=[0.1])


def test_a_seed_under_load_does_not_grow(tmp_path):
    flags = ["--clones", "12", "--every", "0", "--warm-up", "4", "--concurrency", "1", "--without-engine"]
    command = [sys.executable, BENCHMARKS / "soak_clones.py", "--device", "cpu", "--local-mode", "copy", *flags,
               "--output", tmp_path / "out"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
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
