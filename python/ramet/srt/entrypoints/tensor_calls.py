"""Owns what those say who bring weights as tensors, in a session or not, over HTTP or by `Engine`. WIRE: SGLang's."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ramet.srt.entrypoints.http.accepted_fields import WEIGHT_UPDATE, Table
from ramet.srt.entrypoints.http.http_validation import RequestBody, Text
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.weight_calls import Version, update_answer
from ramet.srt.errors import RequestError
from ramet.srt.managers.trainer_group_control import Group
from ramet.srt.managers.update_report import Staged, UpdateReport
from ramet.srt.utils.net import host_identity
from ramet.srt.weights.manifest import element_size
from ramet.srt.weights.update_messages import BroadcastTensors, LentTensors, PickledTensors

MAX_PAYLOADS = 4096  # ranks
MAX_TENSORS = 1 << 20
ONE_BUCKET = 1 << 62  # bytes: all tensors of a call
LOCAL = "ipc://"  # how addresses of ZeroMQ begin behind which are processes of the host

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

# SGLang's "draft" is refused: there is no draft model, so that "all" is the target.
Selector = Annotated[Literal["all", "target"], Field(description="Which model's weights.")]


class BeginBody(RequestBody):
    """What for."""

    foreign: ClassVar[Table] = WEIGHT_UPDATE

    selector: Selector | None = "all"


class EndBody(RequestBody):
    """What the weights are called afterwards."""

    foreign: ClassVar[Table] = WEIGHT_UPDATE

    weight_version: Version | None = None
    discard: bool | None = False  # serve nothing of what has come: the trainer has gone


class TensorsBody(BeginBody):
    """What all calls say that bring tensors."""

    weight_version: Version | None = None
    abort_all_requests: bool | None = False


class FromTensorBody(TensorsBody):
    """What has been pickled."""

    serialized_named_tensors: Annotated[list[str], Field(min_length=1, max_length=MAX_PAYLOADS)]  # base64
    load_format: Literal["direct", "flattened_bucket"] | None = None


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


class FromDistributedBody(TensorsBody):
    """What is broadcast, in this order."""

    names: Names
    dtypes: Dtypes
    shapes: Shapes
    group_name: GroupName = "weight_update_group"
    load_format: Literal["flattened_bucket"] | None = None  # all of it in one broadcast
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


async def put_pickled(instance: Instance, body: FromTensorBody) -> UpdateReport | Staged:
    """Take tensors that a process of this host has pickled. Raises what WeightSessions.put raises."""
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
    return await instance.weight_sessions.put(source, body.weight_version, abort_all=abort_all)


async def join_group(instance: Instance, body: InitGroupBody) -> str:
    """Have all ranks meet a trainer; what to say of it. Raises what TrainerGroupControl.join raises."""
    group = Group(
        name=body.group_name,
        host=body.master_address,
        port=body.master_port,
        rank_offset=body.rank_offset,
        size=body.world_size,
        backend=body.backend,
        timeout_s=body.timeout_s or 300.0,
    )
    await instance.trainer_groups.join(group)
    return f"all ranks are in the group {group.name!r}"


async def leave_group(instance: Instance, body: DestroyGroupBody) -> str:
    """Have all ranks leave it; what to say of it. Raises what TrainerGroupControl.leave raises."""
    await instance.trainer_groups.leave(body.group_name)
    return f"no rank is in the group {body.group_name!r} any more"


async def put_broadcast(instance: Instance, body: FromDistributedBody, call: int) -> UpdateReport | Staged:
    """Take what a trainer broadcasts. Raises what WeightSessions.put raises.

    Args:
        call: as TrainerGroupControl.count_call has counted it.
    """
    source = BroadcastTensors(
        group=body.group_name,
        call=call,
        names=body.names,
        dtypes=listed_types(body.names, body.dtypes, "dtypes", body.shapes),
        shapes=body.shapes,
        bucket_nbytes=None if body.load_format is None else ONE_BUCKET,
        timeout_s=body.timeout_s or 300.0,
    )
    abort_all = bool(body.abort_all_requests)
    return await instance.weight_sessions.put(source, body.weight_version, abort_all=abort_all)


async def put_lent(instance: Instance, body: FromIpcBody) -> UpdateReport | Staged:
    """Take tensors from buffers that processes of this host lend. Raises what WeightSessions.put raises."""
    if others := [address for address in body.zmq_handles.values() if not address.startswith(LOCAL)]:
        raise RequestError(f"processes of this host lend buffers at {LOCAL}…; got {others[0]!r:.200}",
                           param="zmq_handles")  # fmt: skip
    source = LentTensors(sockets=body.zmq_handles, timeout_s=body.timeout_s or 300.0)
    abort_all = bool(body.abort_all_requests)
    return await instance.weight_sessions.put(source, body.weight_version, abort_all=abort_all)


def listed_types(names: Sequence[str], dtypes: Sequence[str], param: str, shapes: Sequence[list[int]]) -> list[str]:
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


def tensors_answer(report: UpdateReport | Staged) -> dict[str, Any]:
    """What came of a call that brings tensors, into a session or by themselves, as it is answered."""
    if isinstance(report, UpdateReport):
        return update_answer(report)
    then = "/end_weight_update serves them"
    if report.lacks:
        then = f"nothing serves now, and {report.lacks} must come before they do"
    return {
        "success": True,
        "message": f"{report.num_bytes} bytes have come; {then}",
        "source": report.source,
        "num_bytes": report.num_bytes,
        "stage_seconds": report.seconds,
    }
