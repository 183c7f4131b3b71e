"""Renaming the weights of an instance: all ranks and replicas, or none that others see."""

import asyncio

import pytest
from ramet.srt.entrypoints.version_control import VersionControl
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.io_struct import RenameWeightsReqOutput
from ramet.srt.weights.control_messages import InstanceStateOutput


class FakeManager:
    """Notes what the replicas are told."""

    def __init__(self) -> None:
        self.weight_version = "v1"
        self.told: list[tuple[str, bool]] = []
        self.silent = False

    async def ask_all(self, question, kind, timeout_s):
        message = question(request_id="a")
        self.told.append((message.version, message.abort_all))
        if self.silent:
            raise ServiceError("the scheduler has not answered")
        return [RenameWeightsReqOutput(request_id="a")]

    def note_weight_version(self, version: str) -> None:
        self.weight_version = version


class Ranks:
    """Three that offer their weights; one may refuse a name."""

    def __init__(self, refuses: str = "") -> None:
        self.versions = {rank: "v1" for rank in range(3)}
        self.refuses = refuses

    async def ask(self, role, rank, news, timeout_s):
        assert role == "target"
        if rank == 1 and news.version == self.refuses:
            raise RequestError("register failed for rank 1")
        self.versions[rank] = news.version
        return InstanceStateOutput()


async def test_all_are_told() -> None:
    manager, ranks = FakeManager(), Ranks()
    await VersionControl(manager, ranks.ask, 3, asyncio.Lock()).rename("v2", abort_all=False)
    assert set(ranks.versions.values()) == {"v2"} and manager.told == [("v2", False)] and manager.weight_version == "v2"


async def test_a_rank_that_can_not_say_it_keeps_all_from_it() -> None:
    manager, ranks = FakeManager(), Ranks(refuses="v2")
    with pytest.raises(RequestError, match="register failed"):
        await VersionControl(manager, ranks.ask, 3, asyncio.Lock()).rename("v2", abort_all=True)
    assert set(ranks.versions.values()) == {"v1"} and manager.told == [] and manager.weight_version == "v1"


async def test_a_replica_that_is_late_does_it_yet() -> None:
    """It has the message: what the instance says is what its answers will say."""
    manager, ranks = FakeManager(), Ranks()
    manager.silent = True
    with pytest.raises(ServiceError):
        await VersionControl(manager, ranks.ask, 3, asyncio.Lock()).rename("v2", abort_all=True)
    assert manager.weight_version == "v2" and set(ranks.versions.values()) == {"v2"}


async def test_an_instance_that_gives_nothing_away() -> None:
    manager, ranks = FakeManager(), Ranks()
    await VersionControl(manager, ranks.ask, 0, asyncio.Lock()).rename("v2", abort_all=True)
    assert set(ranks.versions.values()) == {"v1"} and manager.told == [("v2", True)]
