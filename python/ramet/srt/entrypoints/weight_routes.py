"""Owns the HTTP routes with which a client asks for more of an instance's weights than where they are."""

from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from ramet.srt.entrypoints.event_stream import json_response
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.managers.io_struct import WeightChecksumsOutput, WeightChecksumsReq
from ramet.srt.managers.request_error import RequestError
from ramet.srt.model_loader.seed_registration import ChecksumsRequest

CHECKSUMS_TIMEOUT_S = 60.0

Body = Any


def make_weight_router(instance: Instance, responses: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The routes of `instance`.

    Args:
        responses: how errors look, for the description.
    """
    router = APIRouter(tags=["weights"], responses=responses)

    @router.post("/remote_instance_weight_checksums")
    async def remote_instance_weight_checksums(request: Request) -> Response:
        """Checksums of slices of checkpoint tensors, for a client that has taken other slices than this rank has.

        The body is {"rank": R, "regions": [[tensor's name, [[start, stop], …]], …]}, the answer {"algorithm",
        "checksums": […]}.
        """
        body = _decode(await request.body(), ChecksumsRequest)
        question = WeightChecksumsReq(regions=body.regions)
        reply = await instance.ask_rank_about_weights(body.role, body.rank, question, CHECKSUMS_TIMEOUT_S)
        assert isinstance(reply, WeightChecksumsOutput)
        return json_response({"algorithm": reply.algorithm, "checksums": reply.checksums})

    return router


def _decode(data: bytes, kind: type[Body]) -> Body:
    """Half a million slices would take too long through pydantic."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body can't be used: {error}") from None
