"""Owns the routes about the version of the weights that an instance serves."""

from fastapi import APIRouter
from starlette.responses import Response

from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.http_validation import RequestBody, Text
from ramet.srt.entrypoints.http.weight_answers import VersionOutcome, WeightInfo
from ramet.srt.entrypoints.instance import Instance


class UpdateVersionBody(RequestBody):
    """By which version's name the weights go, and whether requests that run may see that."""

    new_version: Text
    abort_all_requests: bool | None = True


def make_version_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["weights that change"], responses=ERRORS)

    @router.get("/weight_info", responses={200: {"model": WeightInfo}})
    async def weight_info() -> Response:
        """Which version of the weights is served: vLLM's route."""
        return json_response({"weight_version": instance.manager.weight_version})

    @router.post("/update_weight_version", responses={200: {"model": VersionOutcome}})
    async def update_weight_version(body: UpdateVersionBody) -> Response:
        """Give the weights, which stay as they are, another version's name: SGLang's route. Drops the prefix cache.

        Requests that run are ended, unless `abort_all_requests` is false: then their answers name both versions.
        """
        await instance.versions.rename(body.new_version, abort_all=body.abort_all_requests is not False)
        message = f"Weight version updated to {body.new_version}"
        return json_response({"success": True, "message": message, "new_version": body.new_version})

    return router
