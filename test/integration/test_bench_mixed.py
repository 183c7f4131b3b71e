"""The benchmark of mixed loads, in small, against a real server on a CPU."""

import json
import sys
from pathlib import Path

from server_process import run_script

SCRIPT = Path(__file__).resolve().parents[2] / "benchmark" / "bench_mixed.py"


def test_every_group(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, SCRIPT, "--tiny", "--repeats", "1", "--minutes", "0.05", "--output", output]
    ended = run_script(command, 120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    values = json.loads(output.read_text())["values"]
    assert values["failed"] == 0 and values["requests"] > 100
    assert min(values["first token"]["ttft_ms"]) > 0
    assert min(values["16 at once"]["tokens_per_s"]) > 0
    assert values["poisson-long"]["long_ttft"]["p50"] > 0
    assert values["0.05 minutes, last third"]["tokens_per_s"] > 0
    assert "1 x 320 in" in values and any(name.startswith("token time 2 x 5 + 1 x 82") for name in values)


def test_unknown_groups_are_named() -> None:
    ended = run_script([sys.executable, SCRIPT, "--only", "single,doubled"], 30)
    assert ended.returncode == 2 and "unknown groups doubled; known are single, at-once" in ended.stderr
