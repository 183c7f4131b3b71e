"""Loading adapters on several replicas: all of them have one, or none."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import random_models as rm
from lora_adapters import make_adapter
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.entrypoints.start_adapters import load_first_adapters
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.lora.adapter_paths import LoraPath
from ramet.srt.managers.io_struct import LoadLoraReqInput, LoraReqOutput
from ramet.srt.managers.lora_control import LoraControl
from ramet.srt.managers.lora_registry import LoraRegistry
from ramet.srt.managers.metrics import Metrics
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.net import SeedAddress

NUM_REPLICAS = 3


class Manager:
    """Stands in for the tokenizer manager: replicas that note what they are asked, and fail as they are told."""

    def __init__(self):
        self.adapters = LoraRegistry()
        self.weights_refusal = None
        self.metrics = Metrics("base")
        self.held = [set() for _ in range(NUM_REPLICAS)]
        self.failing = {}  # replica -> message, or an exception
        self.gate = asyncio.Event()
        self.gate.set()

    async def ask_all(self, question, kind, timeout_s, replicas=None):
        await self.gate.wait()
        replies = []
        for replica in range(NUM_REPLICAS) if replicas is None else replicas:
            message, failure = question(request_id=str(replica)), self.failing.get(replica)
            if isinstance(failure, Exception):
                raise failure
            if not isinstance(message, LoadLoraReqInput):
                self.held[replica].remove(message.lora_id)
            elif failure is None:
                self.held[replica].add(message.lora_id)
            replies.append(LoraReqOutput(request_id=str(replica), success=failure is None, message=failure or ""))
        return replies


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return str(make_adapter(folder / "adapter", rm.make_model(folder / "model", "llama2", tokenizer=False)))


def make_control(is_on=True):
    manager: Any = Manager()
    dropped, sessions = [], []
    return SimpleNamespace(
        manager=manager,
        dropped=dropped,
        sessions=sessions,
        control=LoraControl(manager, "base", is_on, LoadConfig(), dropped.append, lambda: bool(sessions)),
    )


async def test_none_is_loaded_while_other_weights_are_to_come(adapter):
    """They would be refused at their end. What is loaded can be unloaded at any time."""
    case = make_control()
    await case.control.load(LoraPath("first", adapter))
    case.sessions.append("one")
    with pytest.raises(RequestError, match=r"a session \(/begin_weight_update\) is open"):
        await case.control.load(LoraPath("a", adapter))
    await case.control.unload("first")
    case.sessions.clear()
    case.manager.weights_refusal = "no weights have come yet"
    with pytest.raises(RequestError, match="other weights are to come: no weights have come yet"):
        await case.control.load(LoraPath("a", adapter))
    assert case.manager.held == [set()] * NUM_REPLICAS and not case.manager.adapters.names()
    case.manager.weights_refusal = None
    assert (await case.control.load(LoraPath("a", adapter))).lora_id


async def test_every_replica_gets_it(adapter):
    case = make_control()
    loaded = await case.control.load(LoraPath("a", adapter))
    assert case.manager.held == [{loaded.lora_id}] * NUM_REPLICAS
    await case.control.unload("a")
    assert case.manager.held == [set()] * NUM_REPLICAS and case.dropped == ["a"]
    assert (await case.control.load(LoraPath("a", adapter))).lora_id > loaded.lora_id


async def test_none_keeps_what_one_cannot_load(adapter):
    case = make_control()
    case.manager.failing = {1: "it has no room"}
    with pytest.raises(RequestError, match="the adapter 'a' can't be loaded: it has no room"):
        await case.control.load(LoraPath("a", adapter))
    assert case.manager.held == [set()] * NUM_REPLICAS and case.dropped == ["a"]
    case.manager.failing = {}
    await case.control.load(LoraPath("a", adapter))


async def test_a_replica_that_does_not_answer(adapter):
    case = make_control()
    case.manager.failing = {2: ServiceError("the scheduler has not answered")}
    with pytest.raises(ServiceError):
        await case.control.load(LoraPath("a", adapter))
    assert case.dropped == ["a"] and case.manager.adapters.get("a") is None


async def test_a_name_is_taken_once(adapter):
    """Of two that come at the same time the second finds the first one's name."""
    case = make_control()
    case.manager.gate.clear()
    loads = [asyncio.create_task(case.control.load(LoraPath("a", adapter))) for _ in range(2)]
    await asyncio.sleep(0.05)
    case.manager.gate.set()
    first, second = await asyncio.gather(*loads, return_exceptions=True)
    assert first.adapter.name == "a" and "is loaded already" in str(second)


async def test_an_instance_without_adapters(adapter):
    case = make_control(is_on=False)
    for call in (case.control.load(LoraPath("a", adapter)), case.control.unload("a")):
        with pytest.raises(RequestError, match="--enable-lora"):
            await call


class Asked:
    """Stands in for LoraControl: notes which instances are asked, and how."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []

    async def ask_first(self, addresses, *, are_listed=False):
        self.calls.append((list(addresses), are_listed))
        return self.answer

    async def load_listed(self, address, listed, *, is_listed=False):
        self.calls.append((address, is_listed))


GIVER = SeedAddress("10.0.0.7", 30000)
BY_ADDRESS = {"load_format": "remote_instance", "remote_instance_weight_loader_seed_instance_ip": "10.0.0.7:30000"}
LISTED = {"load_format": "remote_instance", "remote_instance_weight_loader_backend": "modelexpress",
          "modelexpress_config": '{"url": "10.0.0.9:8001"}'}  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "givers", "expected"),
    [
        (BY_ADDRESS, [], [([GIVER], False), (GIVER, False)]),
        (LISTED, ["http://10.0.0.7:30000"], [([GIVER], True), (GIVER, True)]),
        (LISTED, [], []),  # read from files, or given by an engine that has no such URL
        (LISTED | {"weights_digest": "0" * 64}, ["http://10.0.0.7:30000"], []),
        (LISTED | {"enable_lora": False}, ["http://10.0.0.7:30000"], []),
    ],
)
async def test_whose_adapters_an_instance_takes_from_its_start_on(flags, givers, expected):
    args = ServerArgs(**{"model_path": "m", "enable_lora": True} | flags)
    control: Any = Asked((GIVER, []))
    await load_first_adapters(control, [], args, givers)
    assert control.calls == expected


@pytest.mark.parametrize("fallback", ["disk", "error"])
async def test_an_instance_that_tells_no_adapters(fallback):
    args = ServerArgs(model_path="m", enable_lora=True, remote_instance_weight_loader_fallback=fallback, **LISTED)
    control: Any = Asked("it is gone")
    load = load_first_adapters(control, [], args, ["https://10.0.0.7:30000"])
    if fallback == "disk":
        await load
    else:
        with pytest.raises(RequestError, match="it is gone"):
            await load
    assert control.calls == [([SeedAddress("10.0.0.7", 30000, "https")], True)]
