"""Owns the routes that look at an instance's weights: SGLang's, to see that an update has arrived."""

from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from ramet.srt.entrypoints.http.accepted_fields import WEIGHTS_CHECKER, Table
from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.http_validation import RequestBody, Text
from ramet.srt.entrypoints.http.weight_answers import WeightsChecked
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.routes.weight_updates import refusal
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.weights.inspection_messages import CheckAction


class WeightByNameBody(RequestBody):
    """Which tensor, and how much of it."""

    name: Annotated[Text, Field(min_length=1, max_length=4096)]  # the checkpoint's, or this instance's fused one
    truncate_size: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = 100  # rows


class WeightsCheckerBody(RequestBody):
    """What to do with the checksums of all tensors, or with the tensors."""

    foreign: ClassVar[Table] = WEIGHTS_CHECKER

    action: Literal["checksum", "snapshot", "reset_tensors", "compare"] = "checksum"
    selector: Literal["target", "draft", "all"] | None = "all"  # there is no draft model


def make_inspection_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["weight updates"], responses=ERRORS)

    @router.post("/get_weights_by_name", responses={200: {"model": list[Any]}})
    async def get_weights_by_name(body: WeightByNameBody) -> Response:
        """The first rows of a tensor, put together over all ranks; a list of those where there are several replicas."""
        return json_response(await instance.inspection.read(body.name, body.truncate_size or 100))

    @router.post("/weights_checker", responses={200: {"model": WeightsChecked}})
    async def weights_checker(body: WeightsCheckerBody | None = None) -> Response:
        """Hash all tensors of all ranks, keep that, or compare with what was kept; or have all of them replaced.

        After `reset_tensors` nothing is served until an update, or /rollback_weights, has restored the weights.
        """
        body = body or WeightsCheckerBody()
        try:
            if body.selector == "draft":
                raise RequestError("selector: there is no draft model", param="selector")
            if body.action == "reset_tensors":
                await instance.weight_updates.reset()
                return _done("the weights are made up; nothing is served until an update or a rollback restores them")
            return await _check(body.action)
        except (RequestError, ServiceError) as error:
            return refusal(error)

    async def _check(action: CheckAction) -> Response:
        checked = await instance.inspection.check(action)
        if action == "snapshot":
            return _done(f"the checksums of {len(checked.ranks)} ranks are kept")
        if action == "compare":
            return _done("all tensors are those of the snapshot")
        ranks = [
            {
                "checksums": one.checksums,
                "per_gpu_checksum": checked.of_rank(one),
                "parallelism_info": instance.inspection.place(one.rank),
            }
            for one in checked.ranks
        ]
        return _done("all tensors are hashed", ranks=ranks, per_engine_checksum=checked.of_all)

    return router


def _done(message: str, **fields: Any) -> Response:
    return json_response({"success": True, "message": message, **fields})
