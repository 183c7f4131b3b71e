"""Owns the routes by which trainers broadcast or lend weights. WIRE: the first four are SGLang's, the others vLLM's."""

from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.responses import Response

from ramet.srt.entrypoints.http.accepted_fields import TRANSFER, WEIGHT_UPDATE, Table
from ramet.srt.entrypoints.http.answers import Done
from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.http_validation import RequestBody, Text
from ramet.srt.entrypoints.http.weight_answers import TensorsTaken, TransferOutcome, WorldSize
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.routes.weight_sessions import BeginBody, answer_tensors
from ramet.srt.entrypoints.routes.weight_updates import refusal
from ramet.srt.entrypoints.weight_calls import Version
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.trainer_group_control import Group
from ramet.srt.weights.manifest import element_size
from ramet.srt.weights.update_messages import BroadcastTensors, LentTensors

MAX_TENSORS = 1 << 20
ONE_BUCKET = 1 << 62  # bytes: all tensors of a call
STATELESS = "weight transfer engine"  # the name here of the group of vLLM's, which has none
BUFFER_BYTES = 1 << 30  # vLLM's default

Host = Annotated[Text, Field(min_length=1, max_length=253)]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1, le=1 << 20)]
GroupName = Annotated[Text, Field(min_length=1, max_length=256)]
Seconds = Annotated[float, Field(gt=0, le=3600)]
Dtypes = Annotated[list[Annotated[Text, Field(max_length=64)]], Field(max_length=MAX_TENSORS)]
Names = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=1024)]], Field(min_length=1, max_length=MAX_TENSORS)
]
Shape = Annotated[list[Annotated[int, Field(ge=1, le=1 << 48)]], Field(max_length=16)]
Shapes = Annotated[list[Shape], Field(max_length=MAX_TENSORS)]
BufferBytes = Annotated[int, Field(ge=1, le=1 << 48)]


class DestroyGroupBody(RequestBody):
    """Which group."""

    foreign: ClassVar[Table] = WEIGHT_UPDATE

    group_name: GroupName = "weight_update_group"


class InitGroupBody(DestroyGroupBody):
    """Where the trainer is, and which ranks of its group this instance's are."""

    master_address: Host
    master_port: Port
    rank_offset: Count
    world_size: Count  # the trainer's rank 0, and all ranks of all instances
    backend: Literal["nccl", "gloo"] = "nccl"
    timeout_s: Seconds | None = 300.0  # for all members to come


class FromDistributedBody(BeginBody):
    """What is broadcast, in this order."""

    names: Names
    dtypes: Dtypes
    shapes: Shapes
    group_name: GroupName = "weight_update_group"
    load_format: Literal["flattened_bucket"] | None = None  # all of it in one broadcast
    weight_version: Version | None = None
    abort_all_requests: bool | None = False
    timeout_s: Seconds | None = 300.0  # for each broadcast


class FromIpcBody(RequestBody):
    """Which sockets."""

    foreign: ClassVar[Table] = WEIGHT_UPDATE

    zmq_handles: Annotated[
        dict[GroupName, Annotated[Text, Field(max_length=4096)]], Field(min_length=1, max_length=4096)
    ]
    weight_version: Version | None = None
    abort_all_requests: bool | None = False
    timeout_s: Seconds | None = 300.0  # between two messages


class Packing(RequestBody):
    """Whether several tensors are in one broadcast."""

    foreign: ClassVar[Table] = TRANSFER

    packed: bool | None = None
    packed_buffer_size_bytes: BufferBytes | None = None  # a broadcast ends with the tensor that exceeds it

    @property
    def bucket_nbytes(self) -> int | None:
        return (self.packed_buffer_size_bytes or BUFFER_BYTES) if self.packed else None


class InitInfo(Packing):
    """Where the trainer is, and which ranks of its group this instance's are."""

    master_address: Host
    master_port: Port
    rank_offset: Count
    world_size: Count


class InitTransferBody(RequestBody):
    """How weights will come."""

    init_info: InitInfo


class StartBody(RequestBody):
    """What will come."""

    is_checkpoint_format: bool | None = True  # tensors as checkpoints have them; others are refused


class UpdateInfo(Packing):
    """What is broadcast, in this order."""

    names: Names
    dtype_names: Dtypes
    shapes: Shapes


class UpdateWeightsBody(RequestBody):
    """What comes now."""

    update_info: UpdateInfo


class FinishBody(RequestBody):
    """What the weights are called afterwards."""

    weight_version: Version | None = None


def make_trainer_group_router(instance: Instance) -> APIRouter:
    """SGLang's routes for `instance`."""
    router = APIRouter(tags=["weight updates"], responses=ERRORS)

    @router.post("/init_weights_update_group", responses={200: {"model": Done}})
    async def init_weights_update_group(body: InitGroupBody) -> Response:
        """Have all ranks join a group in which a trainer is rank 0; answered when all members have come."""
        group = Group(
            name=body.group_name,
            host=body.master_address,
            port=body.master_port,
            rank_offset=body.rank_offset,
            size=body.world_size,
            backend=body.backend,
            timeout_s=body.timeout_s or 300.0,
        )
        try:
            await instance.trainer_groups.join(group)
        except (RequestError, ServiceError) as error:
            return refusal(error)
        return json_response({"success": True, "message": f"all ranks are in the group {group.name!r}"})

    @router.post("/destroy_weights_update_group", responses={200: {"model": Done}})
    async def destroy_weights_update_group(body: DestroyGroupBody | None = None) -> Response:
        """Leave a group, or stop waiting for its members or for what is broadcast in it."""
        name = (body or DestroyGroupBody()).group_name
        try:
            await instance.trainer_groups.leave(name)
        except (RequestError, ServiceError) as error:
            return refusal(error)
        return json_response({"success": True, "message": f"no rank is in the group {name!r} any more"})

    @router.post("/update_weights_from_distributed", responses={200: {"model": TensorsTaken}})
    async def update_weights_from_distributed(body: FromDistributedBody) -> Response:
        """Receive what the trainer broadcasts: into a session, or as an update of its own."""
        source = BroadcastTensors(
            group=body.group_name,
            call=instance.trainer_groups.count_call(body.group_name),
            names=body.names,
            dtypes=_listed(body.names, body.dtypes, "dtypes", body.shapes),
            shapes=body.shapes,
            bucket_nbytes=None if body.load_format is None else ONE_BUCKET,
            timeout_s=body.timeout_s or 300.0,
        )
        abort_all = bool(body.abort_all_requests)
        return await answer_tensors(instance.weight_sessions.put(source, body.weight_version, abort_all=abort_all))

    @router.post("/update_weights_from_ipc", responses={200: {"model": TensorsTaken}})
    async def update_weights_from_ipc(body: FromIpcBody) -> Response:
        """Take tensors from buffers that processes of the same host lend, as checkpoint-engine does."""
        source = LentTensors(sockets=body.zmq_handles, timeout_s=body.timeout_s or 300.0)
        abort_all = bool(body.abort_all_requests)
        return await answer_tensors(instance.weight_sessions.put(source, body.weight_version, abort_all=abort_all))

    return router


def make_transfer_router(instance: Instance) -> APIRouter:
    """vLLM's routes for `instance`."""
    router = APIRouter(tags=["weight updates"], responses=ERRORS)
    agreed = [Packing()]  # what a trainer has said when the group was made

    @router.post("/init_weight_transfer_engine", responses={200: {"model": TransferOutcome}})
    async def init_weight_transfer_engine(body: InitTransferBody) -> Response:
        """Have all ranks join a group in which a trainer is rank 0; answered when all members have come."""
        info = body.init_info
        group = Group(
            name=STATELESS,
            host=info.master_address,
            port=info.master_port,
            rank_offset=info.rank_offset,
            size=info.world_size,
            backend="auto",
            is_stateless=True,
        )
        await instance.trainer_groups.join(group)
        agreed[0] = info
        return json_response({"message": "Weight transfer initialized"})

    @router.post("/start_weight_update", responses={200: {"model": TransferOutcome}})
    async def start_weight_update(body: StartBody | None = None) -> Response:
        """Open a session, as /begin_weight_update does."""
        if body is not None and body.is_checkpoint_format is False:
            raise RequestError("tensors must come as checkpoints have them: true", param="is_checkpoint_format")
        await instance.weight_sessions.begin()
        return json_response({"message": "Weight update started"})

    @router.post("/update_weights", responses={200: {"model": TransferOutcome}})
    async def update_weights(body: UpdateWeightsBody) -> Response:
        """Receive what the trainer broadcasts: into a session, or as an update of its own."""
        info = body.update_info
        packing: Packing = agreed[0] if info.packed is None else info
        source = BroadcastTensors(
            group=STATELESS,
            call=instance.trainer_groups.count_call(STATELESS),
            names=info.names,
            dtypes=_listed(info.names, info.dtype_names, "update_info.dtype_names", info.shapes),
            shapes=info.shapes,
            bucket_nbytes=packing.bucket_nbytes,
        )
        await instance.weight_sessions.put(source, None, abort_all=False)
        return json_response({"message": "Weights updated"})

    @router.post("/finish_weight_update", responses={200: {"model": TransferOutcome}})
    async def finish_weight_update(body: FinishBody | None = None) -> Response:
        """Serve what has come since the session was opened, as /end_weight_update does."""
        await instance.weight_sessions.end(None if body is None else body.weight_version)
        return json_response({"message": "Weight update finished"})

    @router.get("/get_world_size", responses={200: {"model": WorldSize}})
    async def get_world_size(include_dp: Annotated[bool, Query()] = True) -> Response:
        """How many ranks there are: of all replicas, or of each."""
        args = instance.server_args
        return json_response({"world_size": args.world_size if include_dp else args.world_size // args.dp_size})

    return router


def _listed(names: list[str], dtypes: list[str], param: str, shapes: list[list[int]]) -> list[str]:
    """The types by the names that an arena has for them. Raises RequestError unless all is said of each tensor."""
    if not len(names) == len(dtypes) == len(shapes):
        raise RequestError(
            f"{len(names)} names, {len(dtypes)} types and {len(shapes)} shapes do not belong together", param=param
        )
    plain = [dtype.removeprefix("torch.") for dtype in dtypes]
    try:
        for dtype in set(plain):
            element_size(dtype)
    except ValueError as error:
        raise RequestError(str(error), param=param) from None
    return plain
