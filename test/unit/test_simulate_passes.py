"""The benchmark that simulates passes prints a row for each figure, of each rule."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmark" / "simulate_passes.py"


def test_the_table_has_all_rules_and_the_target_bounds_the_token_time() -> None:
    command = [sys.executable, str(SCRIPT), "--traces", "1", "--seconds", "8", "--markdown"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    strict = ["30 ms, strict", "40 ms, strict", "50 ms, strict"]
    assert head == ["simulated", "by turns", "mixed, early", "mixed, late", *strict]
    figures = {row[0]: dict(zip(head[1:], map(float, row[1:]), strict=True)) for row in rows}
    p99 = figures["token time p99, ms"]
    assert p99["30 ms, strict"] < p99["mixed, late"] < p99["by turns"]
    at_once = figures["256 at once, tokens/s"]
    assert at_once["mixed, late"] > 1.01 * at_once["40 ms, strict"] > 9000
