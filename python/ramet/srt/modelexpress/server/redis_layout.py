"""Owns how records lie in Redis: the keys and JSON texts of the reference server, so that both can share one Redis.

    mx:source:{id}              hash: __attributes__ -> IdentityJson, {worker_id} -> SummaryJson of one of its ranks
    mx:source:{id}:{worker_id}  hash: {rank} -> RecordJson, status:{rank} -> SummaryJson, rewritten by heartbeats

64-bit numbers are JSON strings, because Lua's JSON would round them. Fields of a message that this version does not
know travel in one more key, `unknown_fields`, which the reference server does not read.
"""

import base64
from typing import Any, Generic, TypedDict, TypeVar

import msgspec
from google.protobuf.message import Message
from msgspec import UNSET, UnsetType

from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import worker_tensors

SOURCE_PREFIX = "mx:source:"
SOURCE_PATTERN = SOURCE_PREFIX + "?" * 16
ATTRIBUTES = "__attributes__"


class TensorJson(msgspec.Struct):
    """A tensor as it is written."""

    name: str
    addr: str
    size: str
    device_id: int
    dtype: str


class TensorFields(TypedDict):
    """A tensor as it is read: what protobuf makes a message of, much faster than Python sets its fields."""

    name: str
    addr: int | float
    size: int | float
    device_id: int
    dtype: str


Tensor = TypeVar("Tensor")


class ArtifactJson(msgspec.Struct):
    artifact_id: str
    total_size: str | int | float
    file_count: int
    chunk_count: int
    node_rank: int = 0


class RecordJson(msgspec.Struct, Generic[Tensor], kw_only=True):
    worker_rank: int
    tensors: list[Tensor]
    backend_type: str | None = None  # "nixl", "transfer_engine" or "none"
    nixl_metadata: list[int] = []
    transfer_engine_session_id: str | None = None
    status: int = 0
    updated_at: int = 0
    metadata_endpoint: str = ""
    agent_name: str = ""
    worker_grpc_endpoint: str = ""
    accelerator: str = ""
    topology: dict[str, str] = {}
    artifact_source: ArtifactJson | None = None
    unknown_fields: str | UnsetType = UNSET


class SummaryJson(msgspec.Struct, kw_only=True):
    worker_rank: int
    status: int
    updated_at: int
    accelerator: str = ""
    topology: dict[str, str] = {}
    source_load: float | None | UnsetType = UNSET  # absent when unknown: older reference servers want a number


class IdentityJson(msgspec.Struct, kw_only=True):
    model_name: str
    mx_version: str = ""
    mx_source_type: int = 0
    backend_framework: int = 0
    tensor_parallel_size: int = 0
    pipeline_parallel_size: int = 0
    expert_parallel_size: int = 0
    dtype: str = ""
    quantization: str = ""
    extra_parameters: dict[str, str] = {}
    revision: str = ""
    backend_framework_version: str = ""
    torch_version: str = ""
    cuda_version: str = ""
    triton_version: str = ""
    gpu_arch: str = ""
    compile_config_digest: str = ""
    unknown_fields: str | UnsetType = UNSET


RECORD_DECODER = msgspec.json.Decoder(RecordJson[TensorFields], strict=False)  # not strict: numbers in strings
IDENTITY_FIELDS = [
    name for name in IdentityJson.__struct_fields__ if name not in ("extra_parameters", "unknown_fields")
]
SAME_RECORD_FIELDS = (
    "worker_rank",
    "status",
    "updated_at",
    "metadata_endpoint",
    "agent_name",
    "worker_grpc_endpoint",
    "accelerator",
)


def source_key(source_id: str) -> str:
    return SOURCE_PREFIX + source_id


def worker_key(source_id: str, worker_id: str) -> str:
    return f"{SOURCE_PREFIX}{source_id}:{worker_id}"


def encode_identity(identity: p2p_pb2.SourceIdentity) -> bytes:
    values = {name: getattr(identity, name) for name in IDENTITY_FIELDS}
    values["extra_parameters"] = dict(identity.extra_parameters)
    return msgspec.json.encode(IdentityJson(**values, unknown_fields=encode_unknown(identity)))


def decode_identity(text: bytes) -> p2p_pb2.SourceIdentity:
    """Raises msgspec.DecodeError when the text is not an identity."""
    values = msgspec.json.decode(text, type=IdentityJson)
    identity = p2p_pb2.SourceIdentity(**{name: getattr(values, name) for name in IDENTITY_FIELDS})
    identity.extra_parameters.update(values.extra_parameters)
    decode_unknown(identity, values.unknown_fields)
    return identity


def encode_summary(worker: p2p_pb2.WorkerMetadata) -> bytes:
    return msgspec.json.encode(
        SummaryJson(
            worker_rank=worker.worker_rank,
            status=worker.status,
            updated_at=worker.updated_at,
            accelerator=worker.accelerator,
            topology=dict(worker.topology),
        )
    )


def encode_record(worker: p2p_pb2.WorkerMetadata) -> bytes:
    kind = worker.WhichOneof("backend_metadata")
    artifact = None
    if worker.WhichOneof("source_payload") == "artifact_source":
        source = worker.artifact_source
        artifact = ArtifactJson(
            source.artifact_id, str(source.total_size), source.file_count, source.chunk_count, source.node_rank
        )
    record = RecordJson(
        **{name: getattr(worker, name) for name in SAME_RECORD_FIELDS},
        tensors=[TensorJson(t.name, str(t.addr), str(t.size), t.device_id, t.dtype) for t in worker_tensors(worker)],
        backend_type={"nixl_metadata": "nixl", "transfer_engine_session_id": "transfer_engine"}.get(kind, "none"),
        nixl_metadata=list(worker.nixl_metadata),
        transfer_engine_session_id=worker.transfer_engine_session_id if kind == "transfer_engine_session_id" else None,
        topology=dict(worker.topology),
        artifact_source=artifact,
        unknown_fields=encode_unknown(worker),
    )
    return msgspec.json.encode(record)


class StoredRecord(msgspec.Struct, frozen=True):
    """A record that was read."""

    encoded: bytes  # a WorkerMetadata without status and time
    status: int
    updated_at: int

    def encode_with(self, summary: SummaryJson | None) -> bytes:
        """A WorkerMetadata on the wire, with the status and time of the summary when that is not older."""
        live = self if summary is None or summary.updated_at < self.updated_at else summary
        return self.encoded + p2p_pb2.WorkerMetadata(status=live.status, updated_at=live.updated_at).SerializeToString()


def decode_record(text: bytes) -> StoredRecord:
    """Read a record.

    Raises:
        msgspec.DecodeError: if the text is not a record.
        ValueError: if one of its numbers is out of range.
        OverflowError: if it is infinite.
    """
    record = RECORD_DECODER.decode(text)
    tensors: list[TensorFields] | None = None
    if record.artifact_source is None:
        tensors = record.tensors
        for t in tensors:
            if isinstance(t["addr"], float) or isinstance(t["size"], float):
                t["addr"], t["size"] = int(t["addr"]), int(t["size"])
    worker = p2p_pb2.WorkerMetadata(
        **{name: getattr(record, name) for name in SAME_RECORD_FIELDS},
        tensors=tensors,
        tensor_source=None if tensors is None else {"tensors": tensors},
    )
    worker.topology.update(record.topology)
    if record.backend_type == "transfer_engine" or (record.backend_type is None and record.transfer_engine_session_id):
        worker.transfer_engine_session_id = record.transfer_engine_session_id or ""
    elif record.backend_type == "nixl" or (record.backend_type is None and record.nixl_metadata):
        worker.nixl_metadata = bytes(record.nixl_metadata)
    if (artifact := record.artifact_source) is not None:
        worker.artifact_source.artifact_id, worker.artifact_source.total_size = (
            artifact.artifact_id,
            int(artifact.total_size),
        )
        worker.artifact_source.file_count, worker.artifact_source.chunk_count = (
            artifact.file_count,
            artifact.chunk_count,
        )
        worker.artifact_source.node_rank = artifact.node_rank
    decode_unknown(worker, record.unknown_fields)
    status, updated_at = worker.status, worker.updated_at
    worker.ClearField("status")
    worker.ClearField("updated_at")
    return StoredRecord(worker.SerializeToString(), status, updated_at)


def encode_unknown(message: Message) -> str | UnsetType:
    """The fields of a message that this version has no name for, in base64; UNSET when there are none."""
    rest = type(message).FromString(message.SerializeToString())
    for field in rest.DESCRIPTOR.fields:
        rest.ClearField(field.name)
    data = rest.SerializeToString()
    return base64.b64encode(data).decode() if data else UNSET


def decode_unknown(message: Any, text: str | UnsetType) -> None:
    """Give a message back what encode_unknown took down."""
    if text is not UNSET:
        message.MergeFromString(base64.b64decode(text))
