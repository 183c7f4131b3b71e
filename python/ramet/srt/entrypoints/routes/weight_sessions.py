"""Owns the routes of sessions, which take tensors. WIRE: SGLang's, from its version 0.5.21 on."""

from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from ramet.srt.entrypoints.http.accepted_fields import WEIGHT_UPDATE, Table
from ramet.srt.entrypoints.http.answers import WeightsChanged, WeightSessionOpened
from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.http_validation import RequestBody
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.routes.weight_updates import answer_update, refusal
from ramet.srt.entrypoints.weight_calls import Version
from ramet.srt.errors import RequestError, ServiceError

# SGLang's "draft" is refused: there is no draft model, so that "all" is the target.
Selector = Annotated[Literal["all", "target"], Field(description="Which model's weights.")]


class BeginBody(RequestBody):
    """What for."""

    foreign: ClassVar[Table] = WEIGHT_UPDATE

    selector: Selector | None = "all"


class EndBody(RequestBody):
    """What the weights are called afterwards."""

    foreign: ClassVar[Table] = WEIGHT_UPDATE

    weight_version: Version | None = None


def make_weight_session_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["weight updates"], responses=ERRORS)

    @router.post("/begin_weight_update", responses={200: {"model": WeightSessionOpened}})
    async def begin_weight_update(_body: BeginBody | None = None) -> Response:
        """Open a session: tensors that come from now on are one update, with the next /end_weight_update."""
        try:
            await instance.weight_sessions.begin()
        except (RequestError, ServiceError) as error:
            return refusal(error)
        return json_response({"success": True, "message": "tensors may come now"})

    @router.post("/end_weight_update", responses={200: {"model": WeightsChanged}})
    async def end_weight_update(body: EndBody | None = None) -> Response:
        """Serve what has come since the session was opened, on top of what served."""
        return await answer_update(instance.weight_sessions.end(body.weight_version if body is not None else None))

    return router
