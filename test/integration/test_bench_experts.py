"""The benchmark of experts and fp8, in small, against real servers on a CPU."""

import json
import sys
from pathlib import Path

import pytest
from server_process import run_script

SCRIPT = Path(__file__).resolve().parents[2] / "benchmark" / "bench_experts.py"
sys.path.insert(0, str(SCRIPT.parent))
from bench_experts import Floors, Limits  # noqa: E402 - its folder is made importable above
from gpu_model import EXPERTS_SHAPE, SHAPE  # noqa: E402 - its folder is made importable above

H200 = Limits(copy=4250e9, product=700e12, peer_copy=390e9)


@pytest.mark.parametrize(
    ("shape", "weight_bytes", "expected"), [(SHAPE, 2, 280), (SHAPE, 1, 519), (EXPERTS_SHAPE, 2, 698)]
)
def test_floors_of_one_request(shape, weight_bytes, expected):
    """What 4250 GB/s allow, computed by hand from the numbers of weights."""
    assert 1 / Floors(shape, weight_bytes, H200).decode_s(1, 0) == pytest.approx(expected, rel=0.01)


def test_floors_of_many_count_the_experts_that_are_hit():
    floors = Floors(EXPERTS_SHAPE, 2, H200)
    assert floors.rate(64) < floors.rate(256) < 256 * floors.rate(1)
    assert floors.decode_s(100_000, 0) * H200.copy == pytest.approx(2 * 30.2e9, rel=0.02)


def test_a_part_with_experts(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, SCRIPT, "--tiny", "--repeats", "1", "--only", "experts-fp8"]
    ended = run_script([*command, "--work-dir", tmp_path, "--output", output], 120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    values = json.loads(output.read_text())["values"]
    assert all(values[f"experts-fp8, {what}"] > 0 for what in ("first token", "one request", "4 at once", "16 at once"))


def test_what_a_cpu_can_not_run_is_named() -> None:
    ended = run_script([sys.executable, SCRIPT, "--tiny", "--only", "fp8,ep"], 30)
    assert ended.returncode == 2 and "--tiny: ep need GPUs" in ended.stderr
