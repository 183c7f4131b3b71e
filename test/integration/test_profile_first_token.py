"""The profile of a request's way, in small, on a CPU: every hop is seen, and the hops make up the whole."""

import json
import sys
from pathlib import Path

import pytest
from server_process import run_script

ROOT = Path(__file__).resolve().parents[2]


def test_every_hop_is_seen(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    script = ROOT / "benchmark" / "profile_first_token.py"
    ended = run_script([sys.executable, script, "--device", "cpu", "--requests", "3", "--output", output], 120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    values = json.loads(output.read_text())["values"]["this checkout"]
    assert len(values) == 8 and {"/generate ids", "/v1/completions text streamed"} < set(values)
    for spans in values.values():
        hops = [name for name in spans if name not in ("in", "model", "out", "in and out", "whole")]
        assert len(hops) == 17 and {len(times) for times in spans.values()} == {3}
        for request in range(3):
            assert sum(spans[hop][request] for hop in hops) == pytest.approx(spans["whole"][request])
            assert 0 < spans["in and out"][request] < spans["whole"][request]
