"""Owns the routes for those who run an instance: profiles, the prefix cache, ending requests, metrics."""

import contextlib
import os
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field
from starlette.responses import PlainTextResponse, Response

from ramet.srt.entrypoints.http.answers import Done
from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.http_errors import error_response
from ramet.srt.entrypoints.http.http_validation import RequestBody
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.io_struct import FlushCacheReqOutput, ProfileReqOutput
from ramet.srt.managers.metrics import CONTENT_TYPE

METRICS_TIMEOUT_S = 2.0
EXACTLY_ONE_TARGET: dict[str, Any] = {
    "oneOf": [
        {
            "required": ["rid"],
            "properties": {"rid": {"type": "string", "minLength": 1}, "abort_all": {"enum": [False, None]}},
        },
        {"required": ["abort_all"], "properties": {"rid": {"enum": ["", None]}, "abort_all": {"const": True}}},
    ]
}


class AbortBody(RequestBody):
    """Which request to end: one by its id, or all of them."""

    model_config = ConfigDict(json_schema_extra=EXACTLY_ONE_TARGET)

    rid: Annotated[str, Field(max_length=256)] | None = None  # SGLang's clients send "" for none
    abort_all: bool | None = False


class StartProfileBody(RequestBody):
    """What the ranks record, and where they write it."""

    output_dir: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    num_steps: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    activities: Annotated[list[Literal["CPU", "GPU"]], Field(min_length=1)] | None = None
    with_stack: bool | None = None
    record_shapes: bool | None = None


def make_admin_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["administration"], responses=ERRORS)

    def done_or_refused(reply: FlushCacheReqOutput | ProfileReqOutput) -> Response:
        if not reply.success:
            return error_response(400, reply.message)
        return json_response({"success": True, "message": reply.message})

    @router.api_route("/flush_cache", methods=["GET", "POST"], responses={200: {"model": Done}})
    async def flush_cache() -> Response:
        """Drop the prefix cache; refused while requests run."""
        return done_or_refused(await instance.manager.flush_cache())

    @router.post("/reset_prefix_cache", responses={200: {"model": Done}})
    async def reset_prefix_cache() -> Response:
        """The same by vLLM's name."""
        return done_or_refused(await instance.manager.flush_cache())

    @router.post("/start_profile", responses={200: {"model": Done}})
    async def start_profile(body: StartProfileBody | None = None) -> Response:
        """Have every rank record `num_steps` passes, or all until /stop_profile, and write a Chrome trace."""
        body = body or StartProfileBody()
        reply = await instance.profiles.start(
            root=instance.server_args.profile_root,
            output_dir=_profile_folder(instance, body.output_dir),
            num_steps=body.num_steps,
            activities=list(body.activities or ("CPU", "GPU")),
            with_stack=bool(body.with_stack),
            record_shapes=bool(body.record_shapes),
        )
        return done_or_refused(reply)

    @router.post("/stop_profile", responses={200: {"model": Done}})
    async def stop_profile() -> Response:
        """End the recording; answered when it is written."""
        return done_or_refused(await instance.profiles.stop())

    @router.post("/abort_request", responses={200: {"model": Done}})
    async def abort_request(body: AbortBody, request: Request) -> Response:
        """End a request by its id, or all of them. Succeeds for an unknown id too: it may just have ended."""
        if bool(body.abort_all) == bool(body.rid):
            raise RequestError("exactly one of rid and abort_all must be given", param="rid")
        if body.abort_all and not request.scope["is_admin"]:
            return error_response(401, "abort_all needs the admin key", code="invalid_api_key")
        number = instance.manager.abort(body.rid) if body.rid else instance.manager.abort_all()
        return json_response({"success": True, "message": f"{number} sequences are being aborted"})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        with contextlib.suppress(ServiceError):  # the scheduler is in a long pass: its last numbers are shown
            instance.metrics.observe_states(await instance.manager.internal_states(METRICS_TIMEOUT_S))
        return Response(instance.metrics.render(), media_type=CONTENT_TYPE)

    return router


def _profile_folder(instance: Instance, wanted: str | None) -> str:
    """Where a caller's profile goes: the ranks see to it that it is below the folder that the operator has set."""
    root = instance.server_args.profile_root
    if wanted is not None and not instance.server_args.names_profile_folder:
        raise RequestError(
            "output_dir: callers may choose a folder only below that of --profile-dir, which is not set",
            param="output_dir",
        )
    return os.path.join(root, wanted or "")
