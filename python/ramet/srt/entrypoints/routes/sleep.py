"""Owns the routes that put an instance to sleep and wake it: SGLang's and vLLM's. WIRE: bodies, queries and answers."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from ramet.srt.entrypoints.http.answers import SleepOutcome, SleepState, WakeOutcome
from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.http_validation import RequestBody, Text
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.errors import RequestError
from ramet.srt.weights.memory_messages import ASKED_TAGS, MEMORY_TAGS, AskedTag

Mode = Literal["abort", "wait", "keep"]
Address = Annotated[Text, Field(min_length=1, max_length=4096)]
WakeTag = Literal["weights", "kv_cache", "cuda_graph", "scheduling"]


class ReleaseBody(RequestBody):
    """Which memory, and what becomes of requests."""

    tags: list[AskedTag] | None = None  # none: all
    mode: Mode | None = None  # "keep", unless it is said: all requests wait for the instance to wake


class ResumeBody(RequestBody):
    """Which memory."""

    tags: list[AskedTag] | None = None  # none: all
    address: Address | None = None  # host:port of an instance that has the weights, to be asked before others


def make_sleep_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["sleep"], responses=ERRORS)

    @router.post("/release_memory_occupation", responses={200: {"model": None}})
    async def release_memory_occupation(body: ReleaseBody | None = None) -> Response:
        """Give memory back, and sleep: processes, addresses and graphs stay."""
        body = body or ReleaseBody()
        await instance.sleep.release(body.tags or ASKED_TAGS, body.mode or "keep")
        return json_response(None)

    @router.post("/resume_memory_occupation", responses={200: {"model": None}})
    async def resume_memory_occupation(body: ResumeBody | None = None) -> Response:
        """Take memory again, with the same weights in it; the instance wakes when nothing is missing any more."""
        body = body or ResumeBody()
        await instance.sleep.resume(body.tags or None, body.address)
        return json_response(None)

    @router.post("/sleep", responses={200: {"model": SleepOutcome}})
    async def sleep(
        request: Request,
        level: Annotated[int, Query(ge=0, le=2)] = 1,
        mode: Annotated[Mode, Query()] = "abort",
    ) -> Response:
        """The same in vLLM's words. Level 0 gives nothing back, 1 keeps the weights in host memory, 2 keeps none."""
        _check_query(request, ("level", "mode"))
        moved = await instance.sleep.release(MEMORY_TAGS if level else (), mode, keeps_copy=level == 1)
        return json_response(
            {
                "status": "sleeping",
                "level": level,
                "tags": moved.tags,
                "num_bytes": moved.num_bytes,
                "seconds": moved.seconds,
            }
        )

    @router.post("/wake_up", responses={200: {"model": WakeOutcome}})
    async def wake_up(
        request: Request,
        tags: Annotated[list[WakeTag] | None, Query()] = None,
        address: Annotated[str | None, Query()] = None,
    ) -> Response:
        """Take memory again; generation goes on when nothing is missing any more."""
        _check_query(request, ("tags", "address"))
        moved = await instance.sleep.resume(
            None if tags is None else [tag for tag in tags if tag != "scheduling"], address
        )
        return json_response(
            {
                "status": "sleeping" if moved.tags else "awake",
                "tags": tags,
                "missing": moved.tags,
                "source": moved.source,
                "num_bytes": moved.num_bytes,
                "seconds": moved.seconds,
                "message": moved.trouble,
            }
        )

    @router.get("/is_sleeping", responses={200: {"model": SleepState}})
    async def is_sleeping() -> Response:
        """Whether the instance sleeps, and which memory is given back."""
        return json_response({"is_sleeping": instance.sleep.is_asleep, "tags": instance.sleep.tags})

    return router


def _check_query(request: Request, known: tuple[str, ...]) -> None:
    for name in request.query_params:
        if name not in known:
            raise RequestError(f"{name} is unknown or not supported; {' and '.join(known)} are", param=name)
