"""Questions about weights that cost a rank computing are put to it one after the other."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from ramet.srt.entrypoints.weight_routes import make_weight_router
from ramet.srt.weights.control_messages import DigestTableOutput, WeightChecksumsOutput


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

    instance: Any = SimpleNamespace(ask_rank_about_weights=ask)
    app = FastAPI()
    app.include_router(make_weight_router(instance, {}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://seed") as client:
        answers = await asyncio.gather(*(client.post(path, json=body) for _ in range(12)))
    assert [answer.status_code for answer in answers] == [200] * 12
    assert most_asking == 1
