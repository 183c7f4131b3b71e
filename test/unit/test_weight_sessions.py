"""Sessions over several replicas: what becomes of tensors that come in time, too late, or not at all."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.update_report import Staged, UpdateReport
from ramet.srt.managers.weight_sessions import WeightSessions
from ramet.srt.weights.update_messages import LentTensors, PickledTensors, WeightStepOutput
from updated_replicas import Case, Found

SOURCE = PickledTensors(payloads=[], load_format=None, host_identity="")
SWITCH = ["close", "withdraw", "switch 1", "offer", "open"]
Script = Callable[[WeightSessions], Awaitable[Any]]


async def note_updated() -> None:
    """Nobody sleeps here."""


def run(case: Case, script: Script, timeout_s: float = 60.0) -> Any:
    async def begin() -> Any:
        return await script(WeightSessions(case.control, timeout_s, note_updated))

    return asyncio.run(case._alone(begin))


async def put(sessions: WeightSessions, version: str | None = None, *, abort_all: bool = False) -> Any:
    return await sessions.put(SOURCE, version, abort_all=abort_all)


def test_a_call_without_a_session_is_one_by_itself() -> None:
    case = Case()
    report = run(case, lambda sessions: put(sessions, "one", abort_all=True))
    assert isinstance(report, UpdateReport) and report.version == "one" and report.num_bytes == 15
    assert case.take_events() == ["put 1", "seal 1", "close", "withdraw", "abort", *SWITCH[2:]]
    assert case.names() == ["one", "default"] and case.control.current.origin == "tensors on top of default"


def test_what_comes_in_a_session_serves_when_it_ends() -> None:
    async def script(sessions: WeightSessions) -> UpdateReport:
        await sessions.begin()
        first = await put(sessions, "one")
        assert isinstance(first, Staged) and first.num_bytes == 15
        assert case.take_events() == ["put 1"] and case.names() == ["default"]
        await put(sessions)
        return await sessions.end()

    case = Case()
    report = run(case, script)
    assert (report.version, report.num_bytes) == ("one", 30)
    assert case.take_events() == ["put 1", "seal 1", *SWITCH]
    assert not case.control.has_session


def test_nothing_else_changes_weights_meanwhile() -> None:
    async def script(sessions: WeightSessions) -> None:
        await sessions.begin()
        for other in (case.control.update(Found, None), case.control.rollback(), sessions.begin()):
            with pytest.raises(RequestError, match="a session .*is open"):
                await other
        await put(sessions)
        assert (await sessions.end("last")).version == "last"
        assert (await case.control.rollback()).version == "default"

    case = Case()
    run(case, script)


def test_a_session_may_have_nothing_in_it_or_not_be_open() -> None:
    async def script(sessions: WeightSessions) -> None:
        with pytest.raises(RequestError, match="no session is open"):
            await sessions.end()
        await sessions.begin()
        with pytest.raises(RequestError, match="nothing has come in this session"):
            await sessions.end()
        with pytest.raises(RequestError, match="weight_version"):
            await put(sessions, "bad\nname")
        await put(sessions)

    case = Case()
    run(case, script)
    assert case.take_events() == ["drop 1", "put 2", "seal 2", "close", "withdraw", "switch 2", "offer", "open"]


@pytest.mark.parametrize("fault", ["wrong shape", ServiceError("gone")])
def test_a_bucket_that_fails_ends_the_session_and_what_comes_late_is_no_update(fault: Any) -> None:
    async def script(sessions: WeightSessions) -> None:
        await sessions.begin()
        with pytest.raises((RequestError, ServiceError), match="wrong shape|gone"):
            await put(sessions)
        assert case.take_events() == ["put 1", "drop 1"]
        with pytest.raises(RequestError, match="the session has failed: .*(wrong shape|gone).*comes next"):
            await put(sessions)
        with pytest.raises(RequestError, match="the session has failed"):
            await sessions.end()
        assert case.take_events() == [] and case.names() == ["default"]
        await sessions.begin()
        await put(sessions)
        await sessions.end()

    case = Case(put_1=fault)
    run(case, script)
    assert case.names() == ["update-2", "default"]


def test_replicas_that_were_sent_other_tensors_keep_what_they_have() -> None:
    case = Case()
    case.replicas.received = ["a", "b"]
    with pytest.raises(RequestError, match="were not sent the same tensors"):
        run(case, put)
    assert case.take_events() == ["put 1", "seal 1", "drop 1"] and case.names() == ["default"]


@pytest.mark.parametrize("fault", [{"seal_1": "not what was sent"}, {"withdraw": "not what was sent"}])
def test_an_end_that_fails_changes_nothing(fault: Any) -> None:
    async def script(sessions: WeightSessions) -> None:
        await sessions.begin()
        await put(sessions)
        with pytest.raises(RequestError, match="not what was sent"):
            await sessions.end()
        assert case.names() == ["default"] and not case.replicas.staged
        await put(sessions, "alone")

    case = Case(**fault)
    run(case, script)
    assert case.names() == ["alone", "default"]


def test_adapters_keep_a_session_from_beginning_and_from_ending() -> None:
    async def script(sessions: WeightSessions) -> None:
        await sessions.begin()
        await put(sessions)
        case.replicas.adapters.names = lambda: ["a"]
        for call in (sessions.end(), sessions.begin(), put(sessions)):
            with pytest.raises(RequestError, match="adapters are loaded"):
                await call

    case = Case()
    run(case, script)
    assert case.names() == ["default"] and not case.control.has_session
    assert case.take_events() == ["put 1", "drop 1"]


def test_a_session_may_be_discarded() -> None:
    """Whose trainer has gone, and which nobody else can complete."""

    async def script(sessions: WeightSessions) -> None:
        with pytest.raises(RequestError, match="no session is open"):
            await sessions.discard()
        await sessions.begin()
        await put(sessions)
        await sessions.discard()
        assert case.take_events() == ["put 1", "drop 1"] and case.names() == ["default"]
        await sessions.begin()
        await put(sessions, "again")
        await sessions.end()

    case = Case()
    run(case, script)
    assert case.names() == ["again", "default"]


def test_a_session_that_nobody_goes_on_with_is_given_up() -> None:
    """And not one whose calls come in time."""

    async def script(sessions: WeightSessions) -> None:
        await sessions.begin()
        for _ in range(4):
            await asyncio.sleep(0.1)
            await put(sessions)
        case.take_events()
        async with asyncio.timeout(10):
            while case.control.has_session:
                await asyncio.sleep(0.01)
        with pytest.raises(RequestError, match=r"given up after 0\.3 s without a call; .*comes next"):
            await put(sessions)
        assert (await case.control.update(Found, "files")).version == "files"
        with pytest.raises(RequestError, match="given up"):
            await sessions.end()
        await put(sessions, "later")

    case = Case()
    run(case, script, timeout_s=0.3)
    assert case.take_events()[0] == "drop 1" and case.names() == ["later", "files"]


def part(lacks: str) -> WeightStepOutput:
    """What a replica says of tensors that are not all of them."""
    return WeightStepOutput(request_id="0", success=True, num_bytes=10, source="tensors", lacks=lacks)


def asleep(faults: dict[str, Any]) -> Case:
    """Two replicas whose weights are away."""
    case = Case()
    case.replicas.faults = faults
    case.control.has_weights, case.control.is_asleep = False, True
    return case


def test_in_the_place_of_weights_that_are_away_tensors_wait_until_they_are_whole() -> None:
    async def script(sessions: WeightSessions) -> UpdateReport:
        first = await put(sessions, "one")
        assert isinstance(first, Staged) and (first.num_bytes, first.lacks) == (20, "a and b")
        assert case.take_events() == ["put 1"] and case.control.has_session and not case.control.has_weights
        with pytest.raises(RequestError, match="not all have come yet"):
            await case.control.update(Found, None)
        case.replicas.faults["put 1"] = part("b")
        second = await put(sessions, abort_all=True)
        assert isinstance(second, Staged) and second.lacks == "b" and case.take_events() == ["put 1"]
        return await put(sessions)

    case = asleep({"put 1": part("a and b")})
    report = run(case, script)
    assert (report.version, report.num_bytes) == ("one", 55)
    assert case.take_events() == ["put 1", "seal 1", "abort", "switch 1", "drop 0"]
    assert case.control.has_weights and not case.control.has_session and case.control.current.origin == "tensors"


def test_old_weights_that_are_back_are_nothing_to_mix_with_while_it_sleeps() -> None:
    """As verl does it: it wakes the weights first, which may be there to be taken."""

    async def script(sessions: WeightSessions) -> UpdateReport:
        assert isinstance(await put(sessions), Staged) and case.names() == ["default"]
        return await put(sessions)

    case = asleep({"put 1": part("a")})
    case.control.has_weights = True
    assert run(case, script).num_bytes == 35
    case.control.is_asleep = False
    case.replicas.faults["put 2"] = part("a")  # what does not come is what serves
    assert isinstance(run(case, put), UpdateReport)


def test_what_is_not_whole_never_serves() -> None:
    async def script(sessions: WeightSessions) -> None:
        await put(sessions)
        case.replicas.faults["seal 1"] = "nothing serves that could stay, and a did not come"
        with pytest.raises(RequestError, match="a did not come"):
            await sessions.end()
        assert case.take_events() == ["put 1", "seal 1", "drop 1", "drop 1"] and not case.control.has_session
        case.replicas.faults |= {"put 2": part("a")}
        await put(sessions)
        await sessions.discard()
        assert case.take_events() == ["put 2", "drop 2"] and not case.control.has_session
        case.replicas.faults |= {"put 3": part("a")}
        await put(sessions)
        await sessions.begin()  # a trainer that says when it is done
        assert case.take_events() == ["put 3", "drop 3"] and case.control.has_session
        assert isinstance(await put(sessions), Staged) and case.take_events() == ["put 4"]
        await sessions.discard()
        assert not case.control.has_weights

    case = asleep({"put 1": part("a")})
    run(case, script)


def test_a_part_that_fails_drops_those_before_and_all_of_them_again_serve() -> None:
    async def script(sessions: WeightSessions) -> UpdateReport:
        await put(sessions)
        case.replicas.faults["put 1"] = "a has come before"
        with pytest.raises(RequestError, match="a has come before; what came before is dropped, too: send all"):
            await put(sessions)
        assert "drop 1" in case.take_events() and not case.control.has_session
        return await put(sessions)

    case = asleep({"put 1": part("b")})
    assert run(case, script).num_bytes == 15


def test_a_part_that_comes_when_old_weights_are_back_is_no_update() -> None:
    """Somebody has woken them: it would be half of one thing and half of another."""

    async def script(sessions: WeightSessions) -> UpdateReport:
        await put(sessions)
        case.replicas.faults["put 1"] = "broken"
        with pytest.raises(RequestError):
            await put(sessions)
        case.control.has_weights, case.control.is_asleep = True, False
        case.take_events()
        with pytest.raises(RequestError, match="the session has failed.*broken"):
            await put(sessions)
        assert case.take_events() == []
        await sessions.discard()
        return await put(sessions)

    case = asleep({"put 1": part("b")})
    assert isinstance(run(case, script), UpdateReport)


def test_buffers_are_all_that_comes() -> None:
    """checkpoint-engine says by itself when it is done: what it has not sent will not come."""

    async def script(sessions: WeightSessions) -> None:
        case.replicas.faults["seal 1"] = "a did not come"
        with pytest.raises(RequestError, match="a did not come"):
            await sessions.put(LentTensors(sockets={}), None, abort_all=False)
        assert not case.control.has_session

    case = asleep({"put 1": part("a")})
    run(case, script)
