"""Owns the routes that pause generation and let it go on: SGLang's and vLLM's."""

from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from ramet.srt.entrypoints.http import accepted_fields
from ramet.srt.entrypoints.http.accepted_fields import Table
from ramet.srt.entrypoints.http.answers import PauseOutcome, PauseState, SglangOutcome
from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.http_validation import RequestBody
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.errors import RequestError
from ramet.srt.managers.io_struct import PauseMode


class PauseBody(RequestBody):
    """What becomes of the requests that run or wait."""

    mode: PauseMode = "abort"


class ContinueBody(RequestBody):
    """Nothing that is read."""

    foreign: ClassVar[Table] = accepted_fields.CONTINUE


def make_pause_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["weights that change"], responses=ERRORS)

    @router.post("/pause_generation", responses={200: {"model": SglangOutcome}})
    async def pause_generation(body: PauseBody | None = None) -> Response:
        """Plan no further pass on any replica. Requests that come wait for /continue_generation.

        `abort` ends the requests that are there, `retract` has them start over from their tokens afterwards, `in_place`
        has them go on with the keys and values that they have.
        """
        await instance.pauses.pause((body or PauseBody()).mode)
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    @router.post("/continue_generation", responses={200: {"model": SglangOutcome}})
    async def continue_generation(_body: ContinueBody | None = None) -> Response:
        """End a pause, whoever has begun it."""
        await instance.pauses.go_on()
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    @router.post("/pause", responses={200: {"model": PauseOutcome}})
    async def pause(request: Request, mode: Annotated[Literal["abort", "wait", "keep"], Query()] = "abort") -> Response:
        """The same in vLLM's words.

        `abort` ends the requests that are there, `wait` lets them end first, and both refuse those that come (503);
        `keep` holds all of them until /resume.
        """
        for name in request.query_params:
            if name != "mode":  # older ways to say what becomes of requests, for example
                raise RequestError(f"{name} is unknown or not supported; mode is", param=name)
        if mode == "wait":
            await instance.pauses.pause_when_idle()
        elif mode == "abort":
            await instance.pauses.pause("abort", refuses=True)
        else:
            await instance.pauses.pause("in_place")
        return json_response({"status": "paused"})

    @router.post("/resume", responses={200: {"model": PauseOutcome}})
    async def resume() -> Response:
        """End a pause, whoever has begun it."""
        await instance.pauses.go_on()
        return json_response({"status": "resumed"})

    @router.get("/is_paused", responses={200: {"model": PauseState}})
    async def is_paused() -> Response:
        """Whether generation is paused."""
        return json_response({"is_paused": instance.pauses.is_paused})

    return router
