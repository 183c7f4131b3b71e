"""The steps by which two replicas fall asleep and wake, each of which may fail: what is asked, what is known then."""

import asyncio
import logging
from typing import Any

import pytest
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.pause_control import SLEEP_REFUSAL, PauseControl
from ramet.srt.managers.sleep_control import SleepControl
from ramet.srt.managers.update_report import UpdateReport
from ramet.srt.managers.weight_sessions import WeightSessions
from ramet.srt.managers.weight_update_control import WeightUpdateControl
from ramet.srt.weights.memory_messages import MEMORY_TAGS, ReleaseMemoryReq, ResumeMemoryReq, StartSource
from ramet.srt.weights.update_messages import (
    FilesSource,
    FileStamp,
    InstanceSource,
    PickledTensors,
    WeightStepOutput,
)
from updated_replicas import Found, Sleepers

BOTH = [set(), set()]
ALL = [set(MEMORY_TAGS), set(MEMORY_TAGS)]


class Case:
    def __init__(self, *, can_sleep: bool = True, keeps_copy: bool = False) -> None:
        self.replicas = Sleepers()
        manager: Any = self.replicas
        self.pauses = PauseControl(manager)
        self.updates = WeightUpdateControl(
            manager, "start", 1, self.replicas, self.replicas, asyncio.Lock(), asyncio.Lock()
        )
        self.sleep = SleepControl(manager, self.pauses, self.updates, can_sleep=can_sleep, keeps_copy=keeps_copy)

    async def update(self, source: Any = None) -> None:
        found = Found()
        found.source = source or found.source
        await self.updates.update(lambda: found, None)


@pytest.fixture
def case() -> Case:
    return Case()


FALL_ASLEEP = ["pause retract", "close", "withdraw", "release"]
WAKE = ["resume", "go on", "offer", "open"]


async def test_all_replicas_sleep_and_wake(case: Case) -> None:
    moved = await case.sleep.release(MEMORY_TAGS, "keep")
    assert case.replicas.take_events() == FALL_ASLEEP and case.replicas.gone == ALL
    assert case.sleep.is_asleep and case.sleep.tags == moved.tags == MEMORY_TAGS and moved.num_bytes == 15
    assert case.pauses.reason == "the instance is asleep" and case.replicas.pause_refusal is None
    moved = await case.sleep.resume(None)
    assert case.replicas.take_events() == WAKE and case.replicas.gone == BOTH
    assert not case.sleep.is_asleep and moved.tags == () and moved.source == "checkpoint" and moved.num_bytes == 15
    assert not case.pauses.is_paused and case.pauses.reason is None
    assert (await case.sleep.resume(None)).num_bytes == 0 and case.replicas.take_events() == []


async def test_tags_go_and_come_one_by_one(case: Case) -> None:
    await case.sleep.release(["kv_cache"], "abort")
    assert case.replicas.take_events() == ["pause abort", *FALL_ASLEEP[1:]]
    assert case.pauses.reason == SLEEP_REFUSAL == case.replicas.pause_refusal
    await case.sleep.release(["weights", "kv_cache"], "abort")
    assert case.replicas.take_events() == ["pause abort", "release"] and case.replicas.steps[-1].tags == ["weights"]
    assert (await case.sleep.resume(["weights"])).tags == ("kv_cache",)
    assert case.replicas.take_events() == ["resume"] and case.sleep.is_asleep
    await case.sleep.resume(["kv_cache", "cuda_graph"])
    assert case.replicas.take_events() == WAKE and case.replicas.steps[-1].tags == ["kv_cache"]
    assert case.replicas.pause_refusal is None


async def test_a_pause_that_somebody_has_asked_for_outlasts_a_sleep(case: Case) -> None:
    await case.pauses.pause("abort", refuses=True)
    refusal = case.replicas.pause_refusal
    await case.sleep.release(MEMORY_TAGS, "keep")
    case.replicas.take_events()
    await case.sleep.resume(None)
    assert case.replicas.take_events() == ["resume", "offer", "open"]
    assert case.pauses.is_paused and case.pauses.reason == refusal
    await case.pauses.go_on()
    assert not case.pauses.is_paused


async def test_the_end_of_a_pause_ends_no_sleep(case: Case) -> None:
    """Trainers pause and go on around an update, also while the KV cache is away."""
    await case.pauses.pause("abort", refuses=True)
    await case.sleep.release(MEMORY_TAGS, "keep")
    await case.pauses.go_on()
    assert case.pauses.is_paused and case.sleep.is_asleep and "go on" not in case.replicas.take_events()
    with pytest.raises(RequestError, match="asleep: wake it first"):
        await case.pauses.go_on()
    await case.sleep.resume(None)
    assert not case.pauses.is_paused and case.pauses.reason is None and case.replicas.take_events() == WAKE


async def take_tensors(case: Case) -> UpdateReport:
    """Weights that nobody else has."""
    sessions = WeightSessions(case.updates, 60.0, case.sleep.note_updated)
    source = PickledTensors(payloads=[], load_format=None, host_identity="")
    report = await sessions.put(source, None, abort_all=False)
    assert isinstance(report, UpdateReport)
    return report


async def test_weights_that_nobody_has_are_waited_for_while_something_else_is_missing(case: Case) -> None:
    """As trainers do it: memory for weights first, the weights then, and the KV cache at last."""
    await take_tensors(case)
    for _ in range(2):
        await case.sleep.release(MEMORY_TAGS, "keep")
        case.replicas.take_events()
        moved = await case.sleep.resume(["weights"])
        assert moved.tags == MEMORY_TAGS and "an update must bring them" in moved.trouble
        assert case.replicas.take_events() == [] and case.sleep.is_asleep
        await take_tensors(case)
        assert case.sleep.tags == ("kv_cache",)
        await case.sleep.resume(["kv_cache"])
        assert not case.sleep.is_asleep and case.sleep.tags == ()


async def test_it_does_not_wake_without_weights_that_were_asked_for(case: Case) -> None:
    await take_tensors(case)
    await case.sleep.release(MEMORY_TAGS, "keep")
    await case.sleep.resume(["weights"])
    for tags in (["kv_cache"], ["kv_cache", "weights"], None, ["kv_cache"]):
        case.replicas.faults["resume"] = "nobody is known who has the weights"
        with pytest.raises(RequestError, match="sleeps on: nobody is known"):
            await case.sleep.resume(tags)  # type: ignore[arg-type]
        step = next(step for step in reversed(case.replicas.steps) if isinstance(step, ResumeMemoryReq))
        assert set(step.tags) == set(MEMORY_TAGS)
        assert case.sleep.tags == MEMORY_TAGS
        await case.sleep.release((), "keep")  # which asks for nothing, and forgets what was asked for
        assert (await case.sleep.resume(["weights"])).tags == MEMORY_TAGS
    await case.sleep.resume(["kv_cache", "weights"], "127.0.0.1:1")
    assert not case.sleep.is_asleep


async def test_a_pause_that_comes_while_it_sleeps_lasts_too(case: Case) -> None:
    await case.sleep.release((), "abort")
    assert case.replicas.take_events() == ["pause abort", "close", "withdraw", "release"] and case.sleep.is_asleep
    await case.pauses.pause("in_place")
    await case.sleep.resume(["weights"])  # nothing is missing
    assert not case.sleep.is_asleep and case.pauses.reason == "generation is paused"


async def test_requests_keep_the_cache_that_stays(case: Case) -> None:
    await case.sleep.release(["weights"], "keep")
    await case.sleep.release(["kv_cache"], "keep")
    await case.sleep.release(["weights"], "keep")
    assert [one for one in case.replicas.events if "pause" in one] == ["pause in_place", *["pause retract"] * 2]


async def test_a_pause_does_not_end_that_becomes_a_sleep(case: Case) -> None:
    await case.pauses.pause("in_place")
    async with case.pauses._turn:
        ending = asyncio.create_task(case.pauses.go_on())
        await asyncio.sleep(0)
        case.pauses._is_asleep = True
    await ending
    assert "go on" not in case.replicas.events


async def test_requests_may_end_before(case: Case) -> None:
    await case.sleep.release(MEMORY_TAGS, "wait")
    assert case.replicas.take_events() == ["idle", "pause retract", *FALL_ASLEEP[1:]]
    assert case.replicas.pause_refusal == SLEEP_REFUSAL
    case.replicas.num_running = 1
    with pytest.raises(RequestError, match="would never end"):
        await case.sleep.release((), "wait")
    assert case.sleep.is_asleep and case.replicas.pause_refusal == SLEEP_REFUSAL


@pytest.mark.parametrize("fault", ["no memory", ServiceError("silent")])
@pytest.mark.parametrize("step", ["withdraw", "release"])
async def test_a_sleep_that_fails_is_undone_on_all_replicas(case: Case, step: str, fault: Any) -> None:
    case.replicas.faults = {step: fault}
    with pytest.raises((RequestError, ServiceError), match="no memory|silent"):
        await case.sleep.release(MEMORY_TAGS, "keep")
    events = case.replicas.take_events()
    undone = WAKE if step == "release" else WAKE[1:]  # no memory has gone before
    assert events == [*FALL_ASLEEP[: FALL_ASLEEP.index(step) + 1], *undone] and case.replicas.gone == BOTH
    assert not case.sleep.is_asleep and case.sleep.tags == () and not case.pauses.is_paused
    await case.sleep.release(MEMORY_TAGS, "keep")
    assert case.replicas.gone == ALL


async def test_a_sleep_that_can_not_be_undone_lasts_until_it_can(case: Case) -> None:
    case.replicas.faults = {"release": "broken", "resume": "no source"}
    with pytest.raises(RequestError, match="broken"):
        await case.sleep.release(MEMORY_TAGS, "keep")
    assert case.sleep.is_asleep and case.sleep.tags == MEMORY_TAGS and case.pauses.is_paused
    await case.sleep.resume(None)
    assert not case.sleep.is_asleep and not case.pauses.is_paused and case.replicas.gone == BOTH


async def test_a_wake_that_fails_leaves_all_replicas_asleep(case: Case) -> None:
    await case.sleep.release(MEMORY_TAGS, "keep", keeps_copy=True)
    case.replicas.faults = {"resume": "the files are gone"}
    case.replicas.take_events()
    with pytest.raises(RequestError, match="sleeps on: the files are gone"):
        await case.sleep.resume(None)
    assert case.replicas.take_events() == ["resume", "release"] and case.replicas.gone == ALL
    again = case.replicas.steps[-1]
    assert isinstance(again, ReleaseMemoryReq) and again.keeps_copy
    assert case.sleep.is_asleep and case.sleep.tags == MEMORY_TAGS and case.pauses.is_paused
    case.replicas.faults = {"go on": ServiceError("silent")}
    with pytest.raises(ServiceError):
        await case.sleep.resume(None)
    assert case.sleep.is_asleep and case.sleep.tags == ()
    await case.sleep.resume(None)
    assert not case.sleep.is_asleep and case.replicas.gone == BOTH


async def test_an_update_takes_the_place_of_weights_that_are_put_away(case: Case) -> None:
    """Nobody is told of them before the instance wakes, and there is no way back to what is nowhere."""
    await case.sleep.release(MEMORY_TAGS, "keep")
    case.replicas.take_events()
    await case.update()
    assert case.replicas.take_events() == ["stage 1", "switch 1", "drop 0"]
    assert case.sleep.tags == ("kv_cache",) and not case.updates.kept
    await case.sleep.resume(None)
    assert case.replicas.take_events() == WAKE and case.replicas.steps[-1].tags == ["kv_cache"]


async def test_what_there_is_a_way_back_to_is_given_up_with_the_weights(case: Case) -> None:
    await case.update()
    case.replicas.take_events()
    await case.sleep.release(["kv_cache"], "keep")
    assert [one.number for one in case.updates.kept] == [0]
    await case.sleep.release(["weights"], "keep")
    assert case.replicas.take_events()[-2:] == ["drop 0", "release"] and not case.updates.kept
    assert case.replicas.steps[-1].tags == []  # answered when the memory of what was dropped is free
    with pytest.raises(RequestError, match="no version before this one"):
        await case.updates.rollback()


NO_ROOM = WeightStepOutput(request_id="1", success=False, message="no room", lacks_memory=True)
IN_PLACE = ["stage 1", "drop 1", "pause in_place", "close", "withdraw", "release"]


async def update(case: Case, *, in_place: bool = True) -> Any:
    return await case.sleep.update(Found, "two", abort_all=False, in_place=in_place)


async def test_an_update_without_room_takes_the_place_of_what_serves_if_it_may(case: Case) -> None:
    case.replicas.faults = {"stage 1": NO_ROOM}
    with pytest.raises(RequestError, match="no room"):
        await update(case, in_place=False)
    assert case.replicas.take_events() == ["stage 1", "drop 1"] and not case.sleep.is_asleep
    case.replicas.faults = {"stage 2": NO_ROOM}
    report = await update(case)
    names = [name.replace("1", "2") for name in IN_PLACE]
    assert case.replicas.take_events() == [*names, "stage 3", "switch 3", "drop 0", "go on", "offer", "open"]
    assert (report.mode, report.num_bytes, report.version) == ("in_place", 15, "two") and report.pause_s > 0
    assert not case.sleep.is_asleep and not case.updates.kept and case.updates.has_weights


async def test_an_update_in_place_of_an_instance_asleep_leaves_requests_what_its_sleep_has_said(case: Case) -> None:
    await case.sleep.release(["kv_cache"], "abort")
    case.replicas.faults = {"stage 1": NO_ROOM}
    case.replicas.take_events()
    assert (await update(case)).mode == "in_place"
    assert case.replicas.take_events() == ["stage 1", "drop 1", "release", "stage 2", "switch 2", "drop 0"]
    assert case.sleep.tags == ("kv_cache",) and case.replicas.pause_refusal == SLEEP_REFUSAL


async def test_each_update_is_logged_once_and_as_it_was(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ramet.srt.managers.update_report")
    case.replicas.faults = {"stage 2": NO_ROOM}
    reports = [await update(case), await update(case), await case.updates.update(Found, "three")]
    reports += [await case.updates.rollback(), await take_tensors(case), await case.updates.reset()]
    assert [report.mode for report in reports] == ["staged", "in_place", *["staged"] * 4]
    lines = [one.message for one in caplog.records if one.name == "ramet.srt.managers.update_report"]
    assert lines == [report.message for report in reports] and "15 bytes written from checkpoint" in lines[1]


async def test_what_served_comes_back_when_its_place_is_not_taken(case: Case) -> None:
    case.replicas.faults = {"stage 1": NO_ROOM, "stage 2": "a wrong byte"}
    with pytest.raises(RequestError, match="a wrong byte"):
        await update(case)
    assert case.replicas.take_events() == [*IN_PLACE, "stage 2", "drop 2", *WAKE]
    assert not case.sleep.is_asleep and case.updates.current.number == 0


@pytest.mark.parametrize("by_tensors", [False, True])
async def test_without_the_old_weights_and_the_new_ones_it_sleeps_until_an_update(case: Case, by_tensors: bool) -> None:
    case.replicas.faults = {"stage 1": NO_ROOM, "stage 2": "a wrong byte", "resume": "the files are gone"}
    with pytest.raises(RequestError, match="a wrong byte; the old weights are gone, too, .* the files are gone"):
        await update(case)
    assert case.sleep.is_asleep and case.sleep.tags == ("weights",) and case.pauses.is_paused
    assert case.replicas.take_events()[-3:] == ["resume", "release", "pause abort"]
    assert case.replicas.pause_refusal == SLEEP_REFUSAL
    if by_tensors:
        sessions = WeightSessions(case.updates, 60.0, case.sleep.note_updated)
        source = PickledTensors(payloads=[], load_format=None, host_identity="")
        report = await sessions.put(source, None, abort_all=False)
        assert isinstance(report, UpdateReport) and report.origin == "tensors"
    else:
        report = await update(case)
    staged = ["put 3", "seal 3"] if by_tensors else ["stage 3"]
    assert case.replicas.take_events() == [*staged, "switch 3", "drop 0", "go on", "offer", "open"]
    assert report.mode == "staged" and not case.sleep.is_asleep and case.replicas.pause_refusal is None


async def test_nobody_comes_between_while_what_serves_makes_room(case: Case) -> None:
    """A session that is begun meanwhile opens afterwards: it keeps the update from nothing, nor the instance asleep."""
    case.replicas.faults = {"stage 1": NO_ROOM}
    sessions = WeightSessions(case.updates, 60.0, case.sleep.note_updated)
    updating = asyncio.create_task(update(case))
    while "stage 1" not in case.replicas.events:
        await asyncio.sleep(0)
    await sessions.begin()
    assert (await updating).mode == "in_place" and not case.sleep.is_asleep


async def test_it_wakes_also_if_who_has_updated_it_has_gone_away(case: Case) -> None:
    case.replicas.faults = {"stage 1": NO_ROOM, "stage 2": "a wrong byte", "resume": "the files are gone"}
    with pytest.raises(RequestError, match="the old weights are gone"):
        await update(case)
    caller = asyncio.create_task(update(case))
    while "stage 3" not in case.replicas.events:
        await asyncio.sleep(0)
    caller.cancel()
    async with asyncio.timeout(10):
        while case.sleep.is_asleep:
            await asyncio.sleep(0.01)


async def test_any_other_failure_gives_nothing_up(case: Case) -> None:
    case.replicas.faults = {"stage 1": "a wrong byte"}
    with pytest.raises(RequestError, match="a wrong byte"):
        await update(case)
    assert case.replicas.take_events() == ["stage 1", "drop 1"]


async def test_where_weights_come_from(case: Case) -> None:
    async def sources(address: str | None = None) -> list[Any]:
        await case.sleep.release(["weights"], "keep")
        await case.sleep.resume(None, address)
        step = case.replicas.steps[-1]
        assert isinstance(step, ResumeMemoryReq)
        return step.sources

    assert await sources() == [StartSource()]
    assert await sources("http://10.0.0.7:30000") == [InstanceSource(host="10.0.0.7", port=30000), StartSource()]
    files = FilesSource(path="new", revision="r", files=[FileStamp("a", 1, 2, 3, 4)])
    await case.update(files)
    assert await sources() == [FilesSource(path="new", revision="r")]
    await case.update(InstanceSource(host="h", port=1))
    assert await sources() == [InstanceSource(host="h", port=1)]
    with pytest.raises(RequestError, match="address of an instance"):
        await case.sleep.resume(None, "nonsense")


async def test_what_is_refused(case: Case) -> None:
    plain = Case(can_sleep=False)
    with pytest.raises(RequestError, match="--enable-memory-saver"):
        await plain.sleep.release(["weights"], "keep")
    await plain.sleep.release((), "keep")  # which gives nothing back
    case.updates.has_session = True
    with pytest.raises(RequestError, match="session"):
        await case.sleep.release(["weights"], "keep")
    case.updates.has_session = False
    assert case.replicas.events == [] and not case.sleep.is_asleep


async def test_the_flag_says_whether_a_copy_is_kept() -> None:
    case = Case(keeps_copy=True)
    for said, expected in ((None, True), (False, False)):
        await case.sleep.release(["weights"], "keep", keeps_copy=said)
        step = case.replicas.steps[-1]
        assert isinstance(step, ReleaseMemoryReq) and step.keeps_copy is expected
        await case.sleep.resume(None)
