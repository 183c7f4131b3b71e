"""/health_generate needs no key: however many ask, one token at a time is made."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ramet.srt.entrypoints.routes import health
from ramet.srt.entrypoints.routes.health import HealthProbe
from ramet.srt.errors import ServiceError
from ramet.srt.managers.prepare_requests import Limits


class Manager:
    """Counts generations, which end when `may_end` is set."""

    def __init__(self) -> None:
        self.num_begun = 0
        self.limits = Limits(vocab_size=9, max_req_len=9, has_eos=True, grammars=False)
        self.may_end = asyncio.Event()

    async def generate(self, _inputs: list[Any]) -> Any:
        self.num_begun += 1
        return SimpleNamespace(finish=self.may_end.wait)


async def test_those_who_ask_at_once_share_a_token() -> None:
    manager = Manager()
    instance: Any = SimpleNamespace(manager=manager)
    probe = HealthProbe(instance)
    asking = [asyncio.create_task(probe.wait()) for _ in range(50)]
    await asyncio.sleep(0.01)
    assert manager.num_begun == 1
    asking[0].cancel()  # who has begun it leaves
    await asyncio.sleep(0.01)
    manager.may_end.set()
    await asyncio.gather(*asking[1:])
    assert asking[0].cancelled() and manager.num_begun == 1
    await probe.wait()
    assert manager.num_begun == 2


async def test_no_token_is_an_error_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "HEALTH_TIMEOUT_S", 0.02)
    instance: Any = SimpleNamespace(manager=Manager())
    probe = HealthProbe(instance)
    for outcome in await asyncio.gather(probe.wait(), probe.wait(), return_exceptions=True):
        assert isinstance(outcome, ServiceError)
