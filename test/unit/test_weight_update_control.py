"""The steps of an update over several replicas, each of which may fail: what is asked of whom, what is known after."""

import asyncio
import contextlib
import threading
from typing import Any

import pytest
from ramet.srt.errors import RequestError, ServiceError
from updated_replicas import Case, Found

UPDATE = ["close", "withdraw", "switch 1", "offer", "open"]


def test_an_update_takes_its_steps_in_order() -> None:
    case = Case()
    report = case.update("two", abort_all=True)
    assert case.take_events() == ["stage 1", "close", "withdraw", "abort", "switch 1", "offer", "open"]
    assert (report.version, report.num_bytes, report.pause_s, report.num_reqs) == ("two", 15, 0.5, 2)
    assert "15 bytes staged from checkpoint" in report.message
    assert case.names() == ["two", "default"] and case.control.model_path == "somewhere"


def test_an_instance_that_gives_nothing_only_stages_and_switches() -> None:
    case = Case()
    case.replicas.gives_weights = False
    assert case.update().version == "update-1"
    assert case.take_events() == ["stage 1", "switch 1"]


@pytest.mark.parametrize(("num_kept", "expected"), [
    (0, [["three"], ["stage 2", "close", "withdraw", "switch 2", "drop 1", "offer", "open"]]),
    (1, [["three", "two"], ["drop 0", "stage 2", "close", "withdraw", "switch 2", "offer", "open"]]),
    (2, [["three", "two", "default"], ["stage 2", "close", "withdraw", "switch 2", "offer", "open"]]),
])  # fmt: skip
def test_only_so_many_versions_stay(num_kept: int, expected: Any) -> None:
    case = Case(num_kept)
    case.update("two")
    case.take_events()
    case.update("three")
    assert [case.names(), case.take_events()] == expected
    kept = {one.number for one in case.control.kept}
    assert case.replicas.serving == 2 and case.replicas.staged == kept


def test_the_way_back_leads_forth_again() -> None:
    case = Case()
    case.update("two")
    case.take_events()
    report = case.rollback()
    assert case.take_events() == ["close", "withdraw", "switch 0", "offer", "open"]
    assert report.version == "default" and case.names() == ["default", "two"] and case.control.model_path == "start"
    assert case.rollback().version == "two" and case.replicas.serving == 1


def test_there_may_be_no_way_back() -> None:
    with pytest.raises(RequestError, match="no version before this one is staged"):
        Case().rollback()


@pytest.mark.parametrize(("faults", "error", "events"), [
    ({"stage_1": "no room"}, RequestError, ["stage 1", "drop 1"]),
    ({"stage_1": ServiceError("gone")}, ServiceError, ["stage 1", "drop 1"]),
    ({"withdraw": "no"}, RequestError, ["stage 1", "close", "withdraw", "offer", "open", "drop 1"]),
    ({"withdraw": ServiceError("gone")}, ServiceError, ["stage 1", "close", "withdraw", "offer", "open", "drop 1"]),
])  # fmt: skip
def test_what_fails_before_the_switch_leaves_all_as_it_was(faults: Any, error: type, events: list[str]) -> None:
    case = Case(**faults)
    with pytest.raises(error):
        case.update()
    assert case.take_events() == events and case.names() == ["default"] and not case.replicas.staged
    assert case.replicas.serving == 0 and not case.replicas.ended
    assert case.update().version == "update-2"


def test_what_is_staged_for_the_way_back_survives_a_way_back_that_fails() -> None:
    case = Case()
    case.update("two")
    case.replicas.faults["withdraw"] = "no"
    with pytest.raises(RequestError):
        case.rollback()
    assert case.names() == ["two", "default"] and case.rollback().version == "default"


def test_a_replica_that_does_not_say_that_it_has_switched_ends_the_instance() -> None:
    case = Case(switch_1=ServiceError("gone"))
    with pytest.raises(ServiceError):
        case.update()
    assert "has not said whether it has switched" in case.replicas.ended


@pytest.mark.parametrize("fault", ["refused", ServiceError("late")])
def test_weights_that_others_can_not_take_are_said_so(fault: Any) -> None:
    case = Case(offer=fault)
    report = case.update("two")
    assert "but other instances can't take them" in report.message and case.take_events()[-1] == "offer"
    assert case.names() == ["two", "default"]
    assert case.rollback().trouble == "" and case.take_events()[-1] == "open"


def test_a_source_that_changes_meanwhile_is_taken_anew() -> None:
    case = Case()
    assert case.update("two", Found(num_changes=2)).version == "two"
    assert case.take_events() == ["stage 1", "drop 1", "stage 2", "drop 2", "stage 3",
                                  "close", "withdraw", "switch 3", "offer", "open"]  # fmt: skip
    with pytest.raises(RequestError, match="has changed its weights 3 times"):
        case.update("three", Found(num_changes=9))
    assert case.names() == ["two"] and case.replicas.staged == set()


@pytest.mark.parametrize("faults", [{}, {"stage_1": "no room"}])
def test_what_an_end_waits_for_holds_up_nothing_else(faults: Any) -> None:
    class Slow(Found):
        def end(self, *, has_it: bool) -> None:
            goes_on = threading.Event()
            loop.call_soon_threadsafe(goes_on.set)
            assert goes_on.wait(5.0), "the event loop stands still"
            super().end(has_it=has_it)

    async def update() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        await case._alone(lambda: case.control.update(lambda: found, None))

    case, found = Case(**faults), Slow()
    loop: Any = None
    with pytest.raises(RequestError) if faults else contextlib.nullcontext():
        asyncio.run(update())
    assert found.ends == [not faults]


def test_a_source_of_which_nobody_can_tell_any_more_is_refused() -> None:
    class Gone(Found):
        def is_unchanged(self) -> bool:
            raise ValueError("it is gone")

    case = Case()
    with pytest.raises(RequestError, match="it is gone"):
        case.update(found=Gone())
    assert case.take_events() == ["stage 1", "drop 1"]


def test_loaded_adapters_are_in_the_way() -> None:
    case = Case()
    case.replicas.adapters.names = lambda: ["sql"]
    with pytest.raises(RequestError, match="adapters are loaded, which belong to .*: unload sql"):
        case.update()
    assert case.take_events() == []


def test_who_loads_an_adapter_is_waited_for() -> None:
    case = Case()

    async def ask() -> None:
        case.control._turn = asyncio.Lock()
        async with case.adapters_turn:
            update = asyncio.create_task(case.control.update(Found, "two"))
            await asyncio.sleep(0.05)
            assert case.take_events() == []
        await update

    asyncio.run(ask())
    assert case.names() == ["two", "default"]


@pytest.mark.parametrize("version", ["", "a\nb", "x" * 257])
def test_a_version_is_a_name(version: str) -> None:
    with pytest.raises(RequestError, match="weight_version must be"):
        Case().update(version)


def test_updates_come_one_after_the_other_and_to_their_end_whoever_asked() -> None:
    case = Case()

    async def ask() -> None:
        case.control._turn = asyncio.Lock()
        one = asyncio.create_task(case.control.update(Found, "two"))
        two = asyncio.create_task(case.control.update(Found, "three"))
        while "stage 1" not in case.replicas.events:
            await asyncio.sleep(0)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        await two

    asyncio.run(ask())
    assert case.names() == ["three", "two"]
    assert case.take_events() == [
        "stage 1",
        *UPDATE,
        "drop 0",
        "stage 2",
        "close",
        "withdraw",
        "switch 2",
        "offer",
        "open",
    ]


def test_the_first_weights_leave_no_way_back_to_none() -> None:
    case = Case()
    case.control.await_first()
    case.replicas.weights_refusal = "no weights have come yet"
    with pytest.raises(RequestError, match="no version before this one is staged"):
        case.rollback()
    case.update("one")
    assert case.take_events() == ["stage 1", "close", "withdraw", "switch 1", "drop 0", "offer", "open"]
    assert case.names() == ["one"] and case.replicas.weights_refusal is None
    case.update("two")
    assert case.names() == ["two", "one"]


def test_reset_weights_serve_nothing_are_offered_to_nobody_and_are_no_way_back() -> None:
    case = Case()
    case.reset()
    assert case.take_events() == ["stage 1", "close", "withdraw", "abort", "switch 1"]
    assert case.replicas.weights_refusal and case.names() == ["reset", "default"]
    case.rollback()
    assert case.take_events() == ["close", "withdraw", "switch 0", "drop 1", "offer", "open"]
    assert case.replicas.weights_refusal is None and case.names() == ["default"]
    case.reset()
    case.update("new")
    assert case.replicas.weights_refusal is None and case.names() == ["new"] and case.replicas.staged == set()


@pytest.mark.parametrize("fault", ["stage_1", "withdraw"])
def test_a_reset_that_fails_leaves_what_serves(fault: str) -> None:
    case = Case(**{fault: "no"})
    with pytest.raises(RequestError):
        case.reset()
    assert case.replicas.weights_refusal is None and case.names() == ["default"] and case.replicas.staged == set()


def test_after_a_reset_of_which_a_replica_does_not_tell_nothing_is_served() -> None:
    case = Case(switch_1=ServiceError("no answer"))
    with pytest.raises(ServiceError):
        case.reset()
    assert case.replicas.ended and case.replicas.weights_refusal


def test_reset_weights_are_not_offered_when_an_update_fails_at_its_end() -> None:
    case = Case()
    case.reset()
    case.replicas.faults["withdraw"] = "no"
    case.take_events()
    with pytest.raises(RequestError):
        case.update("new")
    assert not {"offer", "open"} & set(case.take_events())
    assert case.replicas.weights_refusal and case.names()[0] == "reset"
