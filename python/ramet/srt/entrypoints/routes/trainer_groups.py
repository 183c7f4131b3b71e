"""Owns the routes by which trainers broadcast or lend weights. WIRE: the first four are SGLang's, the others vLLM's."""

from typing import Annotated, ClassVar

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from ramet.srt.entrypoints.http.accepted_fields import TRANSFER, Table
from ramet.srt.entrypoints.http.answers import Done
from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.http_validation import RequestBody
from ramet.srt.entrypoints.http.trainer_calls import IS_COUNTED, SGLANGS, VLLMS
from ramet.srt.entrypoints.http.weight_answers import TensorsTaken, TransferOutcome, WorldSize
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.routes.weight_sessions import answer_tensors
from ramet.srt.entrypoints.routes.weight_updates import refusal
from ramet.srt.entrypoints.tensor_calls import (
    Count,
    DestroyGroupBody,
    Dtypes,
    FromDistributedBody,
    FromIpcBody,
    Host,
    InitGroupBody,
    Names,
    Port,
    Shapes,
    join_group,
    leave_group,
    listed_types,
    put_broadcast,
    put_lent,
)
from ramet.srt.entrypoints.weight_calls import Version
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.trainer_group_control import STATELESS, Group
from ramet.srt.weights.update_messages import BroadcastTensors

BUFFER_BYTES = 1 << 30  # vLLM's default

BufferBytes = Annotated[int, Field(ge=1, le=1 << 48)]


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
        try:
            message = await join_group(instance, body)
        except (RequestError, ServiceError) as error:
            return refusal(error)
        return json_response({"success": True, "message": message})

    @router.post("/destroy_weights_update_group", responses={200: {"model": Done}})
    async def destroy_weights_update_group(body: DestroyGroupBody | None = None) -> Response:
        """Leave a group, or stop waiting for its members or for what is broadcast in it."""
        try:
            message = await leave_group(instance, body or DestroyGroupBody())
        except (RequestError, ServiceError) as error:
            return refusal(error)
        return json_response({"success": True, "message": message})

    @router.post(SGLANGS, responses={200: {"model": TensorsTaken}})
    async def update_weights_from_distributed(body: FromDistributedBody, request: Request) -> Response:
        """Receive what the trainer broadcasts: into a session, or as an update of its own."""
        call = _count(instance, request, body.group_name)
        return await answer_tensors(put_broadcast(instance, body, call))

    @router.post("/update_weights_from_ipc", responses={200: {"model": TensorsTaken}})
    async def update_weights_from_ipc(body: FromIpcBody) -> Response:
        """Take tensors from buffers that processes of the same host lend, as checkpoint-engine does."""
        return await answer_tensors(put_lent(instance, body))

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

    @router.post(VLLMS, responses={200: {"model": TransferOutcome}})
    async def update_weights(body: UpdateWeightsBody, request: Request) -> Response:
        """Receive what the trainer broadcasts: into a session, or as an update of its own."""
        info = body.update_info
        packing: Packing = agreed[0] if info.packed is None else info
        source = BroadcastTensors(
            group=STATELESS,
            call=_count(instance, request, STATELESS),
            names=info.names,
            dtypes=listed_types(info.names, info.dtype_names, "update_info.dtype_names", info.shapes),
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


def _count(instance: Instance, request: Request, name: str) -> int:
    """Which call it is in the group of that name, and say that it has been counted; see TrainerCalls."""
    request.scope[IS_COUNTED] = True
    return instance.trainer_groups.count_call(name)
