"""Owns the routes that change an instance's weights. WIRE: `/update_weights_from_disk` is SGLang's."""

from collections.abc import Awaitable

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.weight_answers import WeightsChanged, WeightVersions
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.weight_calls import (
    RollbackBody,
    UpdateDeltaBody,
    UpdateFromDiskBody,
    UpdateFromInstanceBody,
    roll_back,
    update_answer,
    update_by_delta,
    update_from_disk,
    update_from_instance,
    versions_answer,
)
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.update_report import UpdateReport


def make_weight_update_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["weight updates"], responses=ERRORS)

    @router.post("/update_weights_from_disk", responses={200: {"model": WeightsChanged}})
    async def update_weights_from_disk(body: UpdateFromDiskBody) -> Response:
        """Serve other weights of the same model, from files. Requests go on while they are read."""
        return await answer_update(update_from_disk(instance, body))

    @router.post("/update_weights_from_instance", responses={200: {"model": WeightsChanged}})
    async def update_weights_from_instance(body: UpdateFromInstanceBody) -> Response:
        """Serve the weights that another instance serves, of whatever topology."""
        return await answer_update(update_from_instance(instance, body))

    @router.post("/update_weights_delta", responses={200: {"model": WeightsChanged}})
    async def update_weights_delta(body: UpdateDeltaBody) -> Response:
        """Serve what serves with some changes, from a file that says what it belongs on and what it makes."""
        return await answer_update(update_by_delta(instance, body))

    @router.post("/rollback_weights", responses={200: {"model": WeightsChanged}})
    async def rollback_weights(body: RollbackBody | None = None) -> Response:
        """Serve the weights again that served before these."""
        return await answer_update(roll_back(instance, body or RollbackBody()))

    @router.get("/weight_versions", responses={200: {"model": WeightVersions}})
    async def weight_versions() -> Response:
        """The weights that serve, and those to which there is a way back."""
        return json_response(versions_answer(instance))

    return router


async def answer_update(work: Awaitable[UpdateReport]) -> Response:
    """An answer as trainers expect it, of failures too."""
    try:
        return updated(await work)
    except (RequestError, ServiceError) as error:
        return refusal(error)


def updated(report: UpdateReport) -> Response:
    """A success."""
    return json_response(update_answer(report))


def refusal(error: RequestError | ServiceError) -> Response:
    """A failure as trainers expect it."""
    content = msgspec.json.encode({"success": False, "message": str(error)})
    return Response(content, error.status_code, media_type="application/json")
