"""Owns the routes that say whether an instance, or a node of one, is well."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ramet.srt.batch.batch_plan import Pooling
from ramet.srt.entrypoints.http.answers import Status
from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response, until_disconnect
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.errors import ServiceError
from ramet.srt.managers.prepare_requests import SequenceInput
from ramet.srt.sampling.sampling_params import SamplingParams

HEALTH_TIMEOUT_S = 20.0
BAD_HEALTH: dict[int | str, dict[str, Any]] = {503: ERRORS[503]}


def make_node_router(instance: Instance) -> APIRouter:
    """All that a node other than 0 answers: users are served by node 0."""
    router = APIRouter(tags=["health"], responses=BAD_HEALTH)

    @router.get("/health", response_model=Status)
    async def health() -> Response:
        """Whether this node's ranks are running."""
        refusal = instance.refusal() or instance.doubt
        if refusal is not None:
            raise ServiceError(refusal)
        return json_response({"status": "ready"})

    return router


def make_health_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["health"], responses=BAD_HEALTH)

    def check() -> None:
        refusal = instance.refusal() or instance.manager.refusal or instance.doubt
        if refusal is not None:
            raise ServiceError(refusal)

    @router.get("/ready", responses={200: {"model": Status}})
    async def ready() -> Response:
        """Whether a request that comes now is answered soon, and by the fleet's version: in no pause, with weights."""
        check()
        obstacle = instance.pauses.reason or (instance.fleet.obstacle if instance.fleet is not None else None)
        if obstacle is not None:
            raise ServiceError(obstacle)
        return json_response({"status": "ready"})

    @router.get("/health", responses={200: {"model": Status}})
    @router.api_route("/ping", methods=["GET", "POST"], responses={200: {"model": Status}})
    async def health() -> Response:
        """Whether the instance is up, and its processes move; `status` says whether it serves."""
        check()
        return _status(instance)

    probe = HealthProbe(instance)

    @router.get("/health_generate", responses={200: {"model": Status}})
    async def health_generate(request: Request) -> Response:
        """Whether the instance really computes: makes one token or embedding, for all who ask; none if it can't."""
        check()
        if instance.pauses.reason is None:
            try:
                await until_disconnect(request, probe.wait())
            except ServiceError:
                check()
                if instance.pauses.reason is None:  # else the pause has held the token back
                    raise
        return _status(instance)

    return router


def _status(instance: Instance) -> Response:
    """A pause is no sickness, nor is sleep, nor to wait for weights: who restarts what is not well must not do it.

    And trainers wait for /health before they bring the first weights: checkpoint-engine's do.
    """
    if instance.sleep.is_asleep:
        return json_response({"status": "asleep"})
    if instance.manager.weights_refusal is not None:
        return json_response({"status": "awaiting_weights"})
    return json_response({"status": "paused" if instance.pauses.is_paused else "ready"})


class HealthProbe:
    """Makes a token, or an embedding where the model makes those, for whoever asks.

    One at a time: no key is needed, so the queue must not fill with these.
    """

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._task: asyncio.Task[None] | None = None

    async def wait(self) -> None:
        """Until a token is there, perhaps of a generation that is under way. Raises ServiceError if none comes."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._generate())
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # who asked may have left
        await asyncio.shield(self._task)

    async def _generate(self) -> None:
        params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        pooling = Pooling() if self._instance.manager.limits.embedding is not None else None
        prompt = SequenceInput(input_ids=[0], sampling_params=params, pooling=pooling)
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                generation = await self._instance.manager.generate([prompt])
                await generation.finish()
        except TimeoutError:
            raise ServiceError(f"no token was made within {HEALTH_TIMEOUT_S:g} s") from None
