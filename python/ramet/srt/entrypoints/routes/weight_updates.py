"""Owns the routes that change an instance's weights. WIRE: `/update_weights_from_disk` is SGLang's."""

import functools
from collections.abc import Awaitable
from typing import Annotated, ClassVar

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from ramet.srt.entrypoints.http.accepted_fields import WEIGHT_UPDATE, Table
from ramet.srt.entrypoints.http.answers import WeightsChanged, WeightVersions
from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.http_validation import RequestBody, Text
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.weight_sources import (
    FoundFiles,
    FoundInstance,
    find_delta,
    find_files,
    find_instance,
    find_listed,
)
from ramet.srt.managers.weight_update_control import UpdateReport
from ramet.srt.utils.net import reachable_host
from ramet.srt.weights.content_digest import parse_digest
from ramet.srt.weights.version import MAX_VERSION_LEN

Version = Annotated[Text, Field(min_length=1, max_length=MAX_VERSION_LEN)]
Place = Annotated[Text, Field(min_length=1, max_length=4096)]


class RollbackBody(RequestBody):
    """How to switch."""

    foreign: ClassVar[Table] = WEIGHT_UPDATE

    abort_all_requests: bool | None = False  # end what runs before the switch; otherwise it goes on with other weights


class UpdateBody(RollbackBody):
    """What all updates say."""

    weight_version: Version | None = None  # a name for the new weights; made up if there is none
    weights_digest: Text | None = None  # that their content must have, as `ramet digest` prints it

    @property
    def digest(self) -> str | None:
        return None if self.weights_digest is None else parse_digest(self.weights_digest, "weights_digest")


class UpdateFromDiskBody(UpdateBody):
    """Which files."""

    model_path: Place  # folder or hub id, on every node
    revision: Annotated[Text, Field(max_length=256)] | None = None  # of the hub


class UpdateDeltaBody(UpdateBody):
    """Which changes."""

    path: Place  # of the file, on every node: see docs/weight-updates.md
    base_version: Version | None = None  # that must serve; what it holds is compared in any case


class UpdateFromInstanceBody(UpdateBody):
    """Which instance: by its address, or by what a metadata server says that it serves."""

    address: Place | None = None  # host:port, or http:// or https:// before it
    model_name: Place | None = None  # as listed there; this instance's own if there is none
    version: Place | None = None  # the name of a version, a revision, or the digest of the weights


def make_weight_update_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["weight updates"], responses=ERRORS)
    args = instance.server_args

    @router.post("/update_weights_from_disk", responses={200: {"model": WeightsChanged}})
    async def update_weights_from_disk(body: UpdateFromDiskBody) -> Response:
        """Serve other weights of the same model, from files. Requests go on while they are read."""
        find = functools.partial(find_files, instance.model_config, body.model_path, body.revision, body.digest)
        abort_all = bool(body.abort_all_requests)
        return await answer_update(instance.weight_updates.update(find, body.weight_version, abort_all=abort_all))

    @router.post("/update_weights_from_instance", responses={200: {"model": WeightsChanged}})
    async def update_weights_from_instance(body: UpdateFromInstanceBody) -> Response:
        """Serve the weights that another instance serves, of whatever topology."""
        config, digest = args.load_config(), body.digest
        find: functools.partial[FoundInstance]
        if body.address is not None and body.version is None:
            find = functools.partial(find_instance, config, body.address, digest)
        elif body.version is not None and body.address is None:
            own = reachable_host(args.host), args.port
            find = functools.partial(find_listed, config, body.model_name, body.version, own, digest)
        else:
            raise RequestError("exactly one of address and version must be given", param="address")
        abort_all = bool(body.abort_all_requests)
        return await answer_update(instance.weight_updates.update(find, body.weight_version, abort_all=abort_all))

    @router.post("/update_weights_delta", responses={200: {"model": WeightsChanged}})
    async def update_weights_delta(body: UpdateDeltaBody) -> Response:
        """Serve what serves with some changes, from a file that says what it belongs on and what it makes."""
        digest, base = body.digest, body.base_version

        def find() -> FoundFiles:
            return find_delta(body.path, digest, base, instance.manager.weight_version)

        abort_all = bool(body.abort_all_requests)
        return await answer_update(instance.weight_updates.update(find, body.weight_version, abort_all=abort_all))

    @router.post("/rollback_weights", responses={200: {"model": WeightsChanged}})
    async def rollback_weights(body: RollbackBody | None = None) -> Response:
        """Serve the weights again that served before these."""
        abort_all = body is not None and bool(body.abort_all_requests)
        return await answer_update(instance.weight_updates.rollback(abort_all=abort_all))

    @router.get("/weight_versions", responses={200: {"model": WeightVersions}})
    async def weight_versions() -> Response:
        """The weights that serve, and those to which there is a way back."""
        control = instance.weight_updates
        current = control.current
        versions = [
            {
                "weight_version": one.version,
                "origin": one.origin,
                "is_serving": one is current,
                "since": one.since,
            }
            for one in ((current, *control.kept) if control.has_weights else ())
        ]
        return json_response({"versions": versions, "keep_weight_versions": args.keep_weight_versions})

    return router


async def answer_update(work: Awaitable[UpdateReport]) -> Response:
    """An answer as trainers expect it, of failures too."""
    try:
        report = await work
    except (RequestError, ServiceError) as error:
        return refusal(error)
    return updated(report)


def updated(report: UpdateReport) -> Response:
    """A success."""
    return json_response(
        {
            "success": True,
            "message": report.message,
            "num_paused_requests": report.num_reqs,
            "weight_version": report.version,
            "mode": "staged",
            "source": report.source,
            "num_bytes": report.num_bytes,
            "stage_seconds": report.stage_s,
            "pause_seconds": report.pause_s,
        }
    )


def refusal(error: RequestError | ServiceError) -> Response:
    """A failure as trainers expect it."""
    content = msgspec.json.encode({"success": False, "message": str(error)})
    return Response(content, error.status_code, media_type="application/json")
