"""Owns what those say who change an instance's weights, over HTTP or by `Engine`, and what comes of it."""

import functools
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ramet.srt.entrypoints.http.accepted_fields import WEIGHT_UPDATE, Table
from ramet.srt.entrypoints.http.http_validation import RequestBody, Text
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.errors import RequestError
from ramet.srt.managers.published_sources import FoundPublication
from ramet.srt.managers.update_report import UpdateReport
from ramet.srt.managers.weight_sources import (
    FoundFiles,
    FoundInstance,
    find_delta,
    find_files,
    find_instance,
    find_listed,
)
from ramet.srt.utils.net import reachable_host
from ramet.srt.weights.content_digest import parse_digest
from ramet.srt.weights.version import MAX_VERSION_LEN

Version = Annotated[Text, Field(min_length=1, max_length=MAX_VERSION_LEN)]
Place = Annotated[Text, Field(min_length=1, max_length=4096)]


class RollbackBody(RequestBody):
    """How to switch."""

    foreign: ClassVar[Table] = WEIGHT_UPDATE

    abort_all_requests: bool | None = False  # end what runs before the switch; otherwise it goes on with other weights


class NewWeightsBody(RollbackBody):
    """What all updates say."""

    weight_version: Version | None = None  # a name for the new weights; made up if there is none
    weights_digest: Text | None = None  # that their content must have, as `ramet digest` prints it

    @property
    def digest(self) -> str | None:
        """Raises RequestError if it is none."""
        if self.weights_digest is None:
            return None
        try:
            return parse_digest(self.weights_digest, "weights_digest")
        except ValueError as error:
            raise RequestError(str(error), param="weights_digest") from None


class UpdateBody(NewWeightsBody):
    """What those say that need nothing of the weights that serve."""

    # "in_place" lets the weights that serve be given up, in a pause, where there is no room for others beside them.
    mode: Literal["staged", "in_place"] | None = None


class UpdateFromDiskBody(UpdateBody):
    """Which files."""

    model_path: Place  # folder or hub id, on every node
    revision: Annotated[Text, Field(max_length=256)] | None = None  # of the hub


class UpdateDeltaBody(NewWeightsBody):
    """Which changes."""

    path: Place  # of the file, on every node: see docs/weight-updates.md
    base_version: Version | None = None  # that must serve; what it holds is compared in any case


class UpdateFromInstanceBody(UpdateBody):
    """Which instance, or trainer: by its address, or by what a metadata server says that it has."""

    # host:port, or http:// or https:// before it; of a trainer, those of all its ranks with commas between them
    address: Place | None = None
    model_name: Place | None = None  # as listed there; this instance's own if there is none
    version: Place | None = None  # the name of a version, a revision, or the digest of the weights


async def update_from_disk(instance: Instance, body: UpdateFromDiskBody) -> UpdateReport:
    """Serve other weights, from files. Raises what WeightUpdateControl.update raises."""
    find = functools.partial(find_files, instance.model_config, body.model_path, body.revision, body.digest)
    abort_all = bool(body.abort_all_requests)
    in_place = body.mode == "in_place"
    return await instance.sleep.update(find, body.weight_version, abort_all=abort_all, in_place=in_place)


async def update_from_instance(instance: Instance, body: UpdateFromInstanceBody) -> UpdateReport:
    """Serve the weights of another instance. Raises what WeightUpdateControl.update raises."""
    args, digest = instance.server_args, body.digest
    model = instance.model_config
    config = args.load_config(dtype=model.dtype, quantization=args.quantization or model.quantization)
    find: functools.partial[FoundInstance | FoundPublication]
    if body.address is not None and body.version is None:
        find = functools.partial(find_instance, config, body.address, digest)
    elif body.version is not None and body.address is None:
        own = reachable_host(args.host), args.port
        may_give = instance.doors.gives_weights and args.modelexpress is not None and body.weight_version is None
        find = functools.partial(find_listed, config, body.model_name, body.version, own, digest, may_give=may_give)
    else:
        raise RequestError("exactly one of address and version must be given", param="address")
    abort_all = bool(body.abort_all_requests)
    in_place = body.mode == "in_place"
    return await instance.sleep.update(find, body.weight_version, abort_all=abort_all, in_place=in_place)


async def update_by_delta(instance: Instance, body: UpdateDeltaBody) -> UpdateReport:
    """Serve what serves with some changes. Raises what WeightUpdateControl.update raises."""
    digest, base = body.digest, body.base_version

    def find() -> FoundFiles:
        return find_delta(body.path, digest, base, instance.manager.weight_version)

    abort_all = bool(body.abort_all_requests)
    return await instance.weight_updates.update(find, body.weight_version, abort_all=abort_all)


async def roll_back(instance: Instance, body: RollbackBody) -> UpdateReport:
    """Serve what served before. Raises what WeightUpdateControl.rollback raises."""
    return await instance.weight_updates.rollback(abort_all=bool(body.abort_all_requests))


def update_answer(report: UpdateReport) -> dict[str, Any]:
    """What came of an update, as it is answered."""
    return {
        "success": True,
        "message": report.message,
        "num_paused_requests": report.num_reqs,
        "weight_version": report.version,
        "mode": report.mode,
        "source": report.source,
        "num_bytes": report.num_bytes,
        "stage_seconds": report.stage_s,
        "transfer_seconds": report.transfer_s,
        "pause_seconds": report.pause_s,
    }


def versions_answer(instance: Instance) -> dict[str, Any]:
    """The weights that serve, and those to which there is a way back, as they are answered."""
    control = instance.weight_updates
    current = control.current
    versions = [
        {
            "weight_version": one.version,
            "origin": one.origin,
            "is_serving": one is current and not one.is_made_up,
            "since": one.since,
        }
        for one in (current, *control.kept)
        if control.has_come(one)
    ]
    return {"versions": versions, "keep_weight_versions": instance.server_args.keep_weight_versions}
