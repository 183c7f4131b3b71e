"""Owns the tests of fleets with a target: what instances and server decide, with simulated time and network."""

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest
from fleet_simulation import SimulatedFleet
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.entrypoints.fleet_membership import FleetMembership
from ramet.srt.managers.fleet_member import FleetMember, encode
from ramet.srt.modelexpress.server.fleet_targets import FleetTargets, ModelFleet
from ramet.srt.weights.fleet import FleetOrder, FleetReport, FleetTarget, SetTarget, read_report, read_set_target


def ready_fleet(num_instances: int, version: str = "v0") -> SimulatedFleet:
    fleet = SimulatedFleet(0)
    for _ in range(num_instances):
        fleet.join(version)
    fleet.run(3)
    assert all(one.is_ready for one in fleet.living)
    return fleet


def num_ready(fleet: SimulatedFleet) -> int:
    return sum(one.is_ready for one in fleet.living)


@pytest.mark.parametrize(("num_instances", "least"), [(8, 6), (4, 3), (3, 2), (2, 1)])
def test_a_wave_keeps_the_share_serving_and_reaches_all(num_instances, least):
    fleet = ready_fleet(num_instances)
    seen = []
    fleet.check = lambda: seen.append(num_ready(fleet))
    fleet.set("v1")
    fleet.run(60)
    assert {one.version for one in fleet.living} == {"v1"} and num_ready(fleet) == num_instances
    assert min(seen) == least


def test_one_instance_takes_it_first_and_a_bad_version_stops_there():
    fleet = ready_fleet(8)
    fleet.set("v1")
    fleet.run(60)
    fleet.bad.add("v2")
    out = []
    fleet.check = lambda: out.append(sum(one.member.is_taking for one in fleet.living))
    fleet.set("v2")
    fleet.run(30)
    assert max(out) == 1 and {one.version for one in fleet.living} == {"v1"} and num_ready(fleet) == 8
    target = fleet.server.target
    assert (
        target is not None and target.version == "v1" and target.failed == "v2" and "checksums differ" in target.reason
    )


def test_a_version_that_turns_out_bad_in_the_middle_is_left_by_those_that_have_it():
    fleet = ready_fleet(8)
    fleet.set("v1")
    while sum(one.version == "v1" for one in fleet.living) < 3:
        fleet.run(0.1)
    fleet.bad.add("v1")
    fleet.run(60)
    assert {one.version for one in fleet.living} == {"v0"} and num_ready(fleet) == 8


def test_a_newcomer_is_ready_with_the_target_alone_also_in_the_middle_of_a_change():
    fleet = ready_fleet(6)
    fleet.set("v1")
    fleet.run(2)
    late = fleet.join("v0")
    states = []
    fleet.check = lambda: states.append((late.is_ready, late.version))
    fleet.run(60)
    assert late.is_ready and (True, "v0") not in states and {one.version for one in fleet.living} == {"v1"}
    fleet.check = lambda: None
    after = fleet.join("v1")
    fleet.run(2)
    assert after.is_ready


def test_a_server_that_forgets_learns_the_target_from_the_instances():
    fleet = ready_fleet(4)
    fleet.set("v1")
    fleet.run(60)
    fleet.forget()
    late = fleet.join("v0")
    fleet.run(60)
    assert late.version == "v1" and late.is_ready and fleet.server.target.version == "v1"


def test_a_server_that_has_forgotten_whose_turn_it_is_lets_nobody_go_before_all_have_reported():
    fleet = ready_fleet(4)
    seen = []
    fleet.check = lambda: seen.append(num_ready(fleet))
    fleet.set("v1")
    for _ in range(8):
        fleet.run(1.3)
        fleet.forget()
    fleet.run(80)
    assert min(seen) == 3 and {one.version for one in fleet.living} == {"v1"}


def test_no_target_asks_nothing_of_anybody():
    fleet = ready_fleet(3)
    fleet.living[0].version = "mine"
    fleet.run(5)
    assert num_ready(fleet) == 3
    fleet.set("v1")
    fleet.run(60)
    fleet.set("")
    fleet.run(5)
    fleet.living[0].version = "mine"
    fleet.run(5)
    assert num_ready(fleet) == 3 and fleet.living[0].version == "mine"


def test_who_is_changed_by_hand_under_a_target_is_not_ready_until_it_is_back():
    fleet = ready_fleet(3)
    fleet.set("v1")
    fleet.run(60)
    one = fleet.living[0]
    one.version, one.said = "by hand", 0  # what an operator does, no fleet has promised
    assert not one.is_ready
    fleet.run(30)
    assert one.version == "v1" and one.is_ready


def test_a_way_back_that_fails_is_tried_again_until_it_works():
    fleet = ready_fleet(4)
    fleet.set("v1")
    while sum(one.version == "v1" for one in fleet.living) < 2:
        fleet.run(0.1)
    fleet.bad |= {"v1", "v0"}
    fleet.run(40)
    assert sum(one.version == "v1" for one in fleet.living) >= 2 and fleet.server.target.version == "v0"
    fleet.bad.remove("v0")
    fleet.run(40)
    assert num_ready(fleet) == 4 and {one.version for one in fleet.living} == {"v0"}


@pytest.mark.parametrize("others", [[], ["v0"]])
def test_instances_that_await_their_first_weights_are_no_way_back(others):
    fleet = SimulatedFleet(0)
    for version in ["", "", "", *others]:
        fleet.join(version)
    fleet.run(3)
    fleet.bad.add("v1")  # the trainer has not published it yet
    fleet.set("v1")
    fleet.run(30)
    assert fleet.server.target.version == (others[0] if others else "v1")
    fleet.bad.clear()
    fleet.run(60)
    assert {one.version for one in fleet.living} == {fleet.server.target.version} and num_ready(fleet) == len(
        fleet.living
    )


def test_weights_that_are_none_to_serve_have_no_name_in_the_fleet():
    manager = SimpleNamespace(weight_version="default", weights_refusal="no weights yet", refusal=None)
    pauses = SimpleNamespace(reason=manager.weights_refusal)
    others: Any = SimpleNamespace()
    membership = FleetMembership(
        LoadConfig(modelexpress_model_name="m"), ("127.0.0.1", 1), manager, pauses, others, others, may_give=True
    )
    reports = []

    def call_fleet(_method: str, data: bytes) -> bytes:
        reports.append(read_report(data))
        return encode(FleetOrder(target=FleetTarget(number=5, version="default")))

    client: Any = SimpleNamespace(call_fleet=call_fleet)
    asyncio.run(membership._report(client))
    assert reports[0].weight_version == "" and not reports[0].is_ready and membership.obstacle is not None
    manager.weights_refusal = pauses.reason = None
    asyncio.run(membership._report(client))
    assert reports[1].weight_version == "default" and membership.obstacle is None


def test_a_late_answer_is_not_heard():
    member = FleetMember("m", "i", 0.0)
    assert member.obstacle("v0") is not None
    member.take_order(FleetOrder(target=FleetTarget(number=5, version="v5")), "v5")
    assert member.obstacle("v5") is None
    assert member.take_order(FleetOrder(target=FleetTarget(number=4, version="v4"), takes=True), "v5") is None
    assert member.take_order(FleetOrder(), "v5") is None and member.ready_number == 5


def test_without_a_server_an_instance_serves_what_it_has():
    member = FleetMember("m", "i", 0.0)
    member.go_alone()
    assert member.obstacle("v0") is None
    target = FleetTarget(number=5, version="v5")
    member.take_order(FleetOrder(target=target), "v0")
    assert member.obstacle("v0") is None  # it waits for its turn
    assert member.take_order(FleetOrder(target=target, takes=True), "v0") == target
    assert member.obstacle("v0") is not None
    member.note_taken(target, "v0", "no")
    assert member.obstacle("v0") is None and member.report("v0", is_ready=True).error == "no"


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"model": "m"}', b'{"model": "", "instance": "", "started_at": 0, "weight_version": ""}']
)
def test_what_is_no_report_is_refused(data):
    with pytest.raises(ValueError):
        read_report(data)


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b'{"model": "", "version": "v"}',
        b'{"model": "m", "version": "v", "min_serving": 2}',
        b'{"model": "m", "version": "a\\nb"}',
    ],
)
def test_what_is_no_target_is_refused(data):
    with pytest.raises(ValueError):
        read_set_target(data)


def test_more_models_or_instances_than_fit_are_refused(monkeypatch):
    monkeypatch.setattr("ramet.srt.modelexpress.server.fleet_targets.MAX_MODELS", 2)
    monkeypatch.setattr("ramet.srt.modelexpress.server.fleet_targets.MAX_MEMBERS", 2)
    targets = FleetTargets(0.0)
    for name in ("a", "b"):
        targets.report(FleetReport(model=name, instance=name, started_at=0.0, weight_version="v"), 1.0)
    with pytest.raises(ValueError, match="2 instances"):
        targets.report(FleetReport(model="a", instance="c", started_at=0.0, weight_version="v"), 1.0)
    with pytest.raises(ValueError, match="2 models"):
        targets.set(SetTarget(model="c", version="v"), 1.0, 1)
    assert [state.model for state in targets.states()] == ["a", "b"] and isinstance(targets._fleets["a"], ModelFleet)


@pytest.mark.parametrize("batch", range(10))
def test_in_a_hundred_random_orders_nobody_is_answered_by_something_older(batch):
    """Joins, ends, targets good and bad, servers that forget or are away, lost and late messages; then it settles."""
    for seed in range(100 * batch, 100 * batch + 100):
        run_random_order(seed)


def run_random_order(seed: int) -> None:
    chance = random.Random(seed)
    fleet = SimulatedFleet(seed, loss=chance.choice([0.0, 0.1, 0.4]), max_delay_s=chance.choice([0.05, 1.5, 6.0]))
    for _ in range(chance.randint(1, 5)):
        fleet.join("v0")
    for step in range(1, 13):
        fleet.run(chance.uniform(0.2, 8.0))
        take_random_step(fleet, chance, f"v{step}")
    fleet.is_away, fleet.loss, fleet.max_delay_s = False, 0.0, 0.05
    fleet.bad.clear()
    fleet.run(150)
    target = fleet.server.target
    assert all(one.is_ready for one in fleet.living), seed
    if target is not None and target.version:
        assert {one.version for one in fleet.living} == {target.version}, seed


def take_random_step(fleet: SimulatedFleet, chance: random.Random, version: str) -> None:
    match chance.choice(["set", "set bad", "join", "leave", "forget", "away", "back", "spoil", "clear"]):
        case "set":
            fleet.set(version, chance.choice([0.0, 0.5, 0.75, 1.0]))
        case "set bad":
            fleet.bad.add(version)
            fleet.set(version)
        case "join":
            fleet.join("v0")
        case "leave" if len(fleet.living) > 1:
            fleet.leave(chance.choice(fleet.living))
        case "forget":
            fleet.forget()
        case "away" | "back" as where:
            fleet.is_away = where == "away"
        case "spoil" if fleet.server.target is not None:  # it verifies no more, whoever takes it
            fleet.bad.add(fleet.server.target.version)
        case "clear" if chance.random() < 0.3:
            fleet.set("")
