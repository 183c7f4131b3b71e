"""The main process's side of pauses: who is refused when, and what ends a wait for requests to end."""

import asyncio

import pytest
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.io_struct import ContinueReqInput, ContinueReqOutput, PauseReqInput, PauseReqOutput
from ramet.srt.managers.pause_control import REFUSAL, SLEEP_REFUSAL, PauseControl


class FakeManager:
    """Two replicas that note what they are told, and requests that end when a test says so."""

    def __init__(self) -> None:
        self.pause_refusal: str | None = None
        self.weights_refusal: str | None = None
        self.num_running = 0
        self.told: list[str] = []
        self.is_silent = False
        self.idle = asyncio.Event()
        self.idle.set()

    def begin(self) -> None:
        self.num_running += 1
        self.idle.clear()

    def end(self) -> None:
        self.num_running -= 1
        self.idle.set()

    async def wait_idle(self) -> None:
        await self.idle.wait()

    async def ask_all(self, question, kind, timeout_s=10.0):
        message = question(request_id="a")
        self.told.append(message.mode if isinstance(message, PauseReqInput) else type(message).__name__)
        if self.is_silent:
            raise ServiceError("the scheduler has not answered")
        if kind is PauseReqOutput:
            return [PauseReqOutput(request_id="a", num_held=2), PauseReqOutput(request_id="a", num_held=1)]
        return [ContinueReqOutput(request_id="a")] * 2


async def begun(coroutine) -> asyncio.Task:
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def test_a_pause_and_its_end() -> None:
    manager = FakeManager()
    pauses = PauseControl(manager)
    assert not pauses.is_paused and pauses.reason is None
    assert await pauses.pause("retract") == 3
    assert pauses.is_paused and pauses.reason == "generation is paused" and manager.pause_refusal is None
    await pauses.pause("abort", refuses=True)
    assert pauses.reason == manager.pause_refusal == REFUSAL
    await pauses.pause("in_place")
    assert pauses.is_paused and manager.pause_refusal is None  # what the last one says counts
    await pauses.go_on()
    assert not pauses.is_paused and pauses.reason is None
    assert manager.told == ["retract", "abort", "in_place", ContinueReqInput.__name__]


async def test_a_replica_that_does_not_answer_leaves_the_pause_to_be_ended() -> None:
    manager = FakeManager()
    pauses = PauseControl(manager)
    manager.is_silent = True
    with pytest.raises(ServiceError):
        await pauses.pause("abort", refuses=True)
    assert pauses.is_paused
    with pytest.raises(ServiceError):
        await pauses.go_on()
    assert pauses.is_paused and manager.pause_refusal == REFUSAL
    manager.is_silent = False
    await pauses.go_on()
    assert not pauses.is_paused and manager.pause_refusal is None


async def test_waiting_refuses_at_once_and_pauses_at_the_end() -> None:
    manager = FakeManager()
    pauses = PauseControl(manager)
    manager.begin()
    waiting = await begun(pauses.pause_when_idle())
    assert manager.pause_refusal == REFUSAL and not pauses.is_paused and pauses.reason == REFUSAL
    second = await begun(pauses.pause_when_idle())
    manager.end()
    await waiting
    await second
    assert pauses.is_paused and manager.told == ["in_place", "in_place"] and pauses.reason == REFUSAL


@pytest.mark.parametrize("by", ["go_on", "pause"])
async def test_a_wait_that_somebody_overtakes_pauses_nothing(by) -> None:
    manager = FakeManager()
    pauses = PauseControl(manager)
    manager.begin()
    waits = [await begun(pauses.pause_when_idle()) for _ in range(2)]
    await (pauses.go_on() if by == "go_on" else pauses.pause("retract"))
    told = list(manager.told)
    manager.end()
    for wait in waits:
        with pytest.raises(RequestError, match="before all requests had ended"):
            await wait
    assert manager.told == told and pauses.is_paused == (by == "pause") and manager.pause_refusal is None


async def test_requests_that_a_pause_holds_are_not_waited_for() -> None:
    manager = FakeManager()
    pauses = PauseControl(manager)
    manager.begin()
    await pauses.pause("in_place")
    with pytest.raises(RequestError, match="1 requests are held by a pause"):
        await pauses.pause_when_idle()
    manager.end()
    await pauses.pause_when_idle()
    assert manager.pause_refusal == REFUSAL


async def test_a_pause_around_a_sleep_changes_nothing_of_what_the_sleep_has_said() -> None:
    manager = FakeManager()
    pauses = PauseControl(manager)
    await pauses.fall_asleep("abort")
    await pauses.pause("in_place")
    await pauses.go_on()
    assert pauses.is_paused and manager.pause_refusal == SLEEP_REFUSAL
    manager.is_silent = True
    with pytest.raises(ServiceError):
        await pauses.fall_asleep("keep")
    assert pauses.is_paused and manager.pause_refusal == SLEEP_REFUSAL
    manager.is_silent = False
    await pauses.fall_asleep("keep")
    await pauses.pause("abort", refuses=True)
    await pauses.go_on()
    assert pauses.is_paused and manager.pause_refusal is None
    await pauses.wake()
    assert not pauses.is_paused and manager.pause_refusal is None
