"""Calls that announce a broadcast: each is counted once, whatever becomes of it, in the groups that it may be about."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from ramet.srt.entrypoints.http.http_body import BodyMiddleware
from ramet.srt.entrypoints.http.http_errors import install_error_handlers
from ramet.srt.entrypoints.http.trainer_calls import TrainerCalls
from ramet.srt.entrypoints.routes.trainer_groups import make_trainer_group_router, make_transfer_router
from ramet.srt.errors import RequestError
from ramet.srt.managers.trainer_group_control import STATELESS, TrainerGroupControl

SGLANGS, VLLMS = "/update_weights_from_distributed", "/update_weights"
GOOD = {"names": ["a"], "dtypes": ["bfloat16"], "shapes": [[1]], "group_name": "policy"}
JSON = {"content-type": "application/json"}


async def refuse(*_what: Any, **_how: Any) -> Any:
    raise RequestError("not now")


def num_calls(groups: TrainerGroupControl) -> list[int]:
    """That each group has had."""
    return [groups._num_calls[name] for name in ("policy", "other", STATELESS)]


@pytest.fixture
def groups() -> TrainerGroupControl:
    nobody: Any = None
    made = TrainerGroupControl(nobody, nobody, 1)
    made._num_calls = {"policy": 0, "other": 0, STATELESS: 0}
    return made


@pytest.fixture
async def client(groups: TrainerGroupControl) -> AsyncIterator[httpx.AsyncClient]:
    instance: Any = SimpleNamespace(trainer_groups=groups, weight_sessions=SimpleNamespace(put=refuse))
    app, checker = FastAPI(), Any
    install_error_handlers(app)
    for make in (make_trainer_group_router, make_transfer_router):
        app.include_router(make(instance))
    body: Any = BodyMiddleware(app, checker, lambda: 1)  # type: ignore[arg-type]
    front = TrainerCalls(body, lambda by_vllms: groups.count_lost_call(is_stateless=by_vllms))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://one") as made:
        yield made


async def test_a_call_that_its_route_understands_counts_in_its_group(client: Any, groups: Any) -> None:
    for wrong in ({}, {"dtypes": []}, {"dtypes": ["complex64"]}, {"weight_version": "x"}):
        assert (await client.post(SGLANGS, json=GOOD | wrong)).status_code == 400
    assert num_calls(groups) == [4, 0, 0]
    info = {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[1]]}
    assert (await client.post(VLLMS, json={"update_info": info})).status_code == 400
    assert num_calls(groups) == [4, 0, 1]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", JSON, 400),
        (b"{}", JSON, 400),
        (b'{"group_name": "policy", "names": 1}', JSON, 400),
        (b'{"update_info": {"names": []}}', JSON, 400),
        (b"[1]", JSON, 400),
        (b"", JSON, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"[" * 200_000, JSON, 400),
    ],
)
async def test_one_that_nobody_understands_may_be_any_groups(
    client: Any, groups: Any, content: bytes, headers: dict[str, str], status: int
) -> None:
    answers = await asyncio.gather(
        *(client.post(path, content=content, headers=headers) for path in (SGLANGS, VLLMS, VLLMS))
    )
    assert [answer.status_code for answer in answers] == [status] * 3
    assert num_calls(groups) == [1, 1, 2]


async def test_other_calls_are_none(client: Any, groups: Any) -> None:
    assert (await client.get(SGLANGS)).status_code == 405
    assert (await client.post("/destroy_weights_update_group", content=b"{", headers=JSON)).status_code == 400
    assert num_calls(groups) == [0, 0, 0]
