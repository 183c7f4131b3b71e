"""Who took weights from whom is remembered within limits, and nothing is told twice."""

import time

import pytest
from ramet.srt.modelexpress.records import InstanceFacts
from ramet.srt.modelexpress.server import load_history
from ramet.srt.modelexpress.server.load_history import LoadHistory
from ramet.srt.weights.report import LoadReport

NOW = time.time()


def make_facts(number: int, *givers: str, **changes: object) -> InstanceFacts:
    load = LoadReport(source="nccl", num_bytes=4_000_000_000, seconds=2.0, taken_from=givers)
    values = {"instance": f"http://i{number}", "loaded_at": NOW - 1000 + number, "load": load}
    return InstanceFacts(**values | changes)


def test_givers_that_have_gone_keep_their_names() -> None:
    history = LoadHistory()
    history.note("m", "w1", 3, make_facts(1))
    history.note("m", "w2", 0, make_facts(2, "w1", "unknown"))
    (load,) = history.loads(after=1)
    assert (load.instance, load.ended_at, load.taking.gb_per_s) == ("http://i2", NOW - 998, 2.0)
    assert [(giver.instance, giver.worker_rank) for giver in load.taking.taken_from] == [("http://i1", 3), ("", None)]


def test_what_is_known_is_not_noted_again_and_what_is_new_comes_by_its_time() -> None:
    history = LoadHistory()
    for number in (5, 3, 4, 3):
        history.note("m", f"w{number}", 0, make_facts(number))
    history.note("m", "w3", 0, make_facts(6, instance="http://i3", weight_version="v2"))  # other weights
    assert history.num_noted == 4
    assert [load.instance[-1] for load in history.loads()] == ["3", "4", "5", "3"]
    assert [load.weight_version for load in history.loads(after=3)] == ["v2"]
    assert history.loads(after=4) == [] and history.loads(after=99) == []


def test_old_loads_are_let_go_and_do_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of more ranks than are remembered would otherwise be news each time that they are looked at."""
    monkeypatch.setattr(load_history, "MAX_LOADS", 3)
    history = LoadHistory()
    for _ in range(2):
        for number in range(1, 6):
            history.note("m", f"w{number}", 0, make_facts(number))
    assert history.num_noted == 5
    assert [load.instance[-1] for load in history.loads()] == ["3", "4", "5"]


@pytest.mark.parametrize(
    "facts",
    [
        None,
        make_facts(1, loaded_at=0.0),
        make_facts(1, loaded_at=NOW + 10 * 86_400),
        make_facts(1, load=None),
        make_facts(1, host="x" * 5000),
    ],
)
def test_what_is_no_load_or_too_long_is_left_out(facts: InstanceFacts | None) -> None:
    history = LoadHistory()
    history.note("m", "w1", 0, facts)
    assert history.loads() == [] and history.num_noted == 0
