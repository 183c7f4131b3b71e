"""Questions about weights that cost a rank computing are put to it one by one; what no message can hold is refused."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from ramet.srt.entrypoints.http.http_errors import install_error_handlers
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.routes.weights import make_weight_router
from ramet.srt.entrypoints.weight_doors import WeightDoors
from ramet.srt.weights.control_messages import DigestTableOutput, WeightChecksumsOutput
from ramet.srt.weights.registration import ControlAddress


@pytest.mark.parametrize(
    ("path", "body", "reply"),
    [
        ("/remote_instance_weights_digest", {"rank": 0, "first": 0}, DigestTableOutput(num_tensors=0, tensors=b"")),
        (
            "/remote_instance_weight_checksums",
            {"rank": 0, "regions": []},
            WeightChecksumsOutput(algorithm="xxh3_64", checksums=[]),
        ),
    ],
)
async def test_one_at_a_time(path: str, body: dict[str, Any], reply: Any) -> None:
    num_asking = most_asking = 0

    async def ask(*_question: Any) -> Any:
        nonlocal num_asking, most_asking
        num_asking += 1
        most_asking = max(most_asking, num_asking)
        await asyncio.sleep(0.001)
        num_asking -= 1
        return reply

    instance: Any = SimpleNamespace(doors=SimpleNamespace(ask_rank=ask))
    app = FastAPI()
    app.include_router(make_weight_router(instance))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://seed") as client:
        answers = await asyncio.gather(*(client.post(path, json=body) for _ in range(12)))
    assert [answer.status_code for answer in answers] == [200] * 12
    assert most_asking == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/remote_instance_weights_digest", {"rank": 0, "first": 1 << 64}),
        ("/remote_instance_weight_checksums", {"rank": 0, "regions": [["a", [[0, 1 << 64]]]]}),
        ("/remote_instance_weight_checksums", {"rank": 0, "regions": [["a", [[-1 << 64, 1]]]]}),
        ("/init_weights_send_group_for_remote_instance", {"rank": 0, "broadcasts": [[[0, 1 << 64, 1, 1]]]}),
        ("/init_weights_send_group_for_remote_instance", {"rank": 0, "ports": "9" * 5000}),
        ("/init_weights_send_group_for_remote_instance", {"group_name": "a", "ports": "9" * 5000}),
        ("/send_weights_to_remote_instance", {"group_name": "a", "ports": "9" * 5000}),
    ],
)
async def test_numbers_that_no_message_can_hold_are_the_clients_mistake(path: str, body: dict[str, Any]) -> None:
    instance = Instance.__new__(Instance)  # its only part here: where its rank listens
    address = ControlAddress(token="x", name="no such socket")
    bootstrap = cast(Any, SimpleNamespace(control_address=lambda _role, _rank: address))
    instance.doors = WeightDoors(bootstrap, 0, is_listed=False)
    instance.server_args = cast(Any, SimpleNamespace(tp_size=1, pp_size=1))
    app = FastAPI()
    install_error_handlers(app)
    app.include_router(make_weight_router(instance))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://seed") as client:
        answer = await client.post(path, json=body)
    assert (answer.status_code, len(answer.content) < 1000) == (400, True), answer.text
