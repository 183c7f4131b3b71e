"""The benchmark that simulates passes prints a row for each figure, of each rule."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmark" / "simulate_passes.py"


def test_the_table_has_all_rules_and_the_target_bounds_the_token_time() -> None:
    command = [sys.executable, str(SCRIPT), "--traces", "1", "--seconds", "8", "--markdown"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert head == ["simulated", "by turns", "mixed, early", "mixed, late", "late, 30 ms", "late, 50 ms"]
    figures = {row[0]: dict(zip(head[1:], map(float, row[1:]), strict=True)) for row in rows}
    p99 = figures["token time p99, ms"]
    assert p99["late, 30 ms"] < p99["mixed, late"] < p99["by turns"]
    assert figures["256 at once, tokens/s"]["mixed, late"] > 9000
