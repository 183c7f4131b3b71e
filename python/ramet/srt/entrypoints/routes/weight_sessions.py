"""Owns the routes of sessions, which take tensors. WIRE: SGLang's, from its version 0.5.21 on."""

import base64
from collections.abc import Awaitable
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from ramet.srt.entrypoints.http.accepted_fields import WEIGHT_UPDATE, Table
from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.http_validation import RequestBody
from ramet.srt.entrypoints.http.weight_answers import TensorsTaken, WeightsChanged, WeightSessionOpened
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.routes.weight_updates import answer_update, refusal, updated
from ramet.srt.entrypoints.weight_calls import Version
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.update_report import Staged, UpdateReport
from ramet.srt.utils.net import host_identity, is_own_address
from ramet.srt.weights.update_messages import PickledTensors

MAX_PAYLOADS = 4096  # ranks

# SGLang's "draft" is refused: there is no draft model, so that "all" is the target.
Selector = Annotated[Literal["all", "target"], Field(description="Which model's weights.")]


class BeginBody(RequestBody):
    """What for."""

    foreign: ClassVar[Table] = WEIGHT_UPDATE

    selector: Selector | None = "all"


class FromTensorBody(BeginBody):
    """What has been pickled."""

    serialized_named_tensors: Annotated[list[str], Field(min_length=1, max_length=MAX_PAYLOADS)]  # base64
    load_format: Literal["direct", "flattened_bucket"] | None = None
    weight_version: Version | None = None
    abort_all_requests: bool | None = False


class EndBody(RequestBody):
    """What the weights are called afterwards."""

    foreign: ClassVar[Table] = WEIGHT_UPDATE

    weight_version: Version | None = None
    discard: bool | None = False  # serve nothing of what has come: the trainer has gone


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
        num_payloads, tp_size = len(body.serialized_named_tensors), instance.server_args.tp_size
        if num_payloads not in (1, tp_size):
            raise RequestError(
                f"there must be one payload, or one for each of {tp_size} tensor-parallel ranks; got {num_payloads}",
                param="serialized_named_tensors",
            )
        try:
            payloads = [base64.b64decode(text, validate=True) for text in body.serialized_named_tensors]
        except ValueError:
            raise RequestError("it must be base64", param="serialized_named_tensors") from None
        source = PickledTensors(payloads=payloads, load_format=body.load_format, host_identity=host_identity())
        abort_all = bool(body.abort_all_requests)
        return await answer_tensors(instance.weight_sessions.put(source, body.weight_version, abort_all=abort_all))

    return router


async def answer_tensors(work: Awaitable[UpdateReport | Staged]) -> Response:
    """An answer to a call that brings tensors, into a session or by themselves."""
    try:
        report = await work
    except (RequestError, ServiceError) as error:
        return refusal(error)
    if isinstance(report, UpdateReport):
        return updated(report)
    message = f"{report.num_bytes} bytes have come; /end_weight_update serves them"
    return json_response(
        {
            "success": True,
            "message": message,
            "source": report.source,
            "num_bytes": report.num_bytes,
            "stage_seconds": report.seconds,
        }
    )
