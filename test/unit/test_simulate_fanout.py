"""Owns the tests of the simulated fan-out: cases whose result can be counted by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmark" / "simulate_fanout.py"


@pytest.fixture(scope="module")
def simulation():
    spec = importlib.util.spec_from_file_location("simulate_fanout", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def strategy(simulation, **fields):
    return simulation.Strategy("case", **fields)


def test_one_seed_sends_every_copy_over_its_one_link(simulation):
    at_once = simulation.spread(strategy(simulation, fanout=None, all_give=False), 10, 8.0, 2.0, 1.0)
    assert at_once.loaded_s == pytest.approx([41.0] * 10) and at_once.most_given == 10
    in_turn = simulation.spread(strategy(simulation, fanout=1, all_give=False), 3, 8.0, 2.0, 1.0)
    assert in_turn.loaded_s == pytest.approx([5.0, 9.0, 13.0])


def test_loaded_instances_double_in_each_round(simulation):
    """The first seed starts its next transfer at once, a new one after its setup: without setup the number doubles."""
    result = simulation.spread(strategy(simulation, fanout=1), 15, 8.0, 2.0, 0.0)
    assert result.loaded_s == pytest.approx([4.0] + [8.0] * 2 + [12.0] * 4 + [16.0] * 8)


def test_two_seeds_do_not_make_a_client_s_own_link_faster(simulation):
    case = strategy(simulation, fanout=2, num_seeds=2)
    result = simulation.spread(case, 3, 8.0, 2.0, 0.0)
    assert len(result.loaded_s) == 3 and result.loaded_s[0] >= 4.0


def test_a_chain_and_neighbours_on_a_host(simulation):
    assert simulation.chain(3, 8.0, 2.0, 1.0).loaded_s == pytest.approx([5.0, 10.0, 15.0])
    link = simulation.Link("link", 2.0, 8.0)
    alone = simulation.over_hosts(strategy(simulation, fanout=1), 4, 4, 8.0, link)
    assert alone.loaded_s == pytest.approx([0.0] + [simulation.LOCAL_S + link.setup_s(8.0)] * 3)
