"""Owns the tests of simulated clones at once: what can be counted by hand, and what is promised of them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmark" / "simulate_pieces.py"
SIZE, RATE = 64 << 20, float(1 << 20)


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate_pieces", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_one_clone_takes_as_long_as_its_link(simulation: ModuleType) -> None:
    outcome = simulation.PieceSpread(1, SIZE, RATE, 0.0).run()
    assert outcome.done_s == pytest.approx([64.0], abs=0.1) and outcome.seed_bytes == SIZE


@pytest.mark.parametrize("count", [2, 8])
def test_the_last_of_several_ends_little_later_and_the_seed_sends_few_copies(
    simulation: ModuleType, count: int
) -> None:
    outcome = simulation.PieceSpread(count, SIZE, RATE, 0.02).run()
    assert len(outcome.done_s) == count
    assert max(outcome.done_s) < 1.5 * 64.0
    assert SIZE <= outcome.seed_bytes < 2 * SIZE
