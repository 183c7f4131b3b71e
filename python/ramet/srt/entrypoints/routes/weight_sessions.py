"""Owns the routes of sessions, which take tensors. WIRE: SGLang's, from its version 0.5.21 on."""

from collections.abc import Awaitable

from fastapi import APIRouter, Request
from starlette.responses import Response

from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.weight_answers import TensorsTaken, WeightsChanged, WeightSessionOpened
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.routes.weight_updates import answer_update, refusal
from ramet.srt.entrypoints.tensor_calls import BeginBody, EndBody, FromTensorBody, put_pickled, tensors_answer
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.update_report import Staged, UpdateReport
from ramet.srt.utils.net import is_own_address


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
        """Serve what has come since the session was opened, on top of what served; or forget it."""
        body = body or EndBody()
        if not body.discard:
            return await answer_update(instance.weight_sessions.end(body.weight_version))
        try:
            await instance.weight_sessions.discard()
        except (RequestError, ServiceError) as error:
            return refusal(error)
        return json_response({"success": True, "message": "nothing has come of the session"})

    @router.post("/update_weights_from_tensor", responses={200: {"model": TensorsTaken}})
    async def update_weights_from_tensor(body: FromTensorBody, request: Request) -> Response:
        """Take tensors that a process of the same host has pickled: into a session, or as an update of their own."""
        if request.client is None or not is_own_address(request.client.host):
            raise RequestError("pickled tensors are taken from this host alone", status_code=403)
        return await answer_tensors(put_pickled(instance, body))

    return router


async def answer_tensors(work: Awaitable[UpdateReport | Staged]) -> Response:
    """An answer to a call that brings tensors, into a session or by themselves."""
    try:
        return json_response(tensors_answer(await work))
    except (RequestError, ServiceError) as error:
        return refusal(error)
