"""Owns what a worker's record holds: how it is made from a weight manifest, and how any peer's record is read.

What ModelExpress has no field for travels in two places that every other reader leaves alone:

- `metadata_endpoint` is the URL at which the instance itself answers for this rank, with its manifest, its checksums
  and its handle for clients on the same host. So the record stays small, there is one truth about the weights (the
  instance's), a reference server and its Redis layout carry it unharmed (they drop fields that they don't know), and a
  seed that has died is noticed at the first connection. Other engines put a NIXL `host:port` there, without a scheme.
- `topology`, a map from a domain to this worker's place in it, has one more key, "ramet", with InstanceFacts as JSON.
  It comes with every listing; topology-aware clients only look at the domains that they were told to compare.
"""

import socket
from collections.abc import Mapping, Sequence

import msgspec

from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.utils.outside_json import Natural, decode_json
from ramet.srt.weights.manifest import WeightManifest, layout_digest
from ramet.srt.weights.report import LoadReport
from ramet.srt.weights.version import DEFAULT_VERSION

FACTS_KEY = "ramet"
DTYPE_PREFIX = "torch."  # published readers compare with str(tensor.dtype)


class InstanceFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a record says about the instance behind it."""

    instance: str  # the same for all ranks of one instance, and fit to show: its URL
    host: str = ""
    world_rank: Natural = 0
    started_at: float = 0.0  # unix seconds
    loaded_at: float = 0.0  # unix seconds: when the rank had these weights; 0 from versions that don't say
    heartbeat_s: float = 0.0  # how often the record is renewed; 0 from versions that don't say
    layout_signature: str = ""  # digest of the arena's layout: the same digest, the same bytes at the same offsets
    weights_digest: str = ""  # of the checkpoint that the weights are from; what it says proves nothing
    is_tied: bool | None = None  # whether the output head is the embedding's table; None from versions that don't say
    weight_version: str = DEFAULT_VERSION
    trainer_run: str | None = None  # of a trainer, whose ranks hold parts of a model; None: of an instance
    load: LoadReport | None = None  # how the rank came to its weights; taken_from are worker ids


class SourceTensor(msgspec.Struct, frozen=True):
    """One tensor of a source. `dtype` is "" when the source does not say (SGLang's first integration)."""

    name: str
    addr: int
    nbytes: int
    dtype: str
    device_id: int = 0


class SourceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A source as a client sees it."""

    source_id: str
    worker_id: str
    worker_rank: int
    status: int
    updated_at: int  # unix milliseconds
    session_id: str  # of Mooncake's TransferEngine; "" when the source has none
    tensors: tuple[SourceTensor, ...]
    accelerator: str
    info_url: str  # where the instance answers for this rank; "" for other engines
    facts: InstanceFacts | None


def make_instance_facts(
    instance_url: str,
    started_at: float,
    manifest: WeightManifest,
    report: LoadReport | None = None,
    weights_digest: str = "",
    loaded_at: float = 0.0,
) -> InstanceFacts:
    """What a record or a claim says about the instance behind it."""
    return InstanceFacts(
        instance=instance_url,
        host=socket.gethostname(),
        world_rank=manifest.parallel.world_rank,
        started_at=started_at,
        loaded_at=loaded_at,
        layout_signature=layout_digest(manifest),
        weights_digest=weights_digest,
        is_tied=manifest.is_tied,
        weight_version=manifest.weight_version,
        load=report,
    )


def build_worker_metadata(
    manifest: WeightManifest,
    *,
    base_address: int,
    session_id: str,
    info_url: str,
    facts: InstanceFacts,
    accelerator: str = "cpu",
    device_id: int = 0,
    topology: Mapping[str, str] | None = None,
) -> p2p_pb2.WorkerMetadata:
    """The record of one rank, with its tensors for readers of 0.3 and for those of 0.7. Status and time are not set.

    Args:
        manifest: what lies in the rank's arena.
        base_address: address of the arena's first byte.
        session_id: the rank's Mooncake session; "" when it has none.
        info_url: URL at which the instance answers for this rank; "" when it doesn't.
        facts: shown on the fleet page, and to clients of this engine.
        topology: places in the data center that topology-aware clients compare, passed on as they are.
    """
    tensors = [
        p2p_pb2.TensorDescriptor(
            name=entry.name,
            addr=base_address + entry.offset,
            size=entry.nbytes,
            device_id=device_id,
            dtype=DTYPE_PREFIX + entry.dtype,
        )
        for entry in manifest.entries
    ]
    worker = p2p_pb2.WorkerMetadata(
        worker_rank=manifest.parallel.shard_rank,
        tensors=tensors,
        metadata_endpoint=info_url,
        accelerator=accelerator,
        topology={**(topology or {}), FACTS_KEY: encode_facts(facts)},
        tensor_source=p2p_pb2.TensorSourceMetadata(tensors=tensors),
    )
    if session_id:
        worker.transfer_engine_session_id = session_id
    return worker


def encode_facts(facts: InstanceFacts) -> str:
    """The facts as JSON, without fields that have their default or that nobody needs: each listing has them."""
    values = msgspec.to_builtins(facts)
    if facts.load is not None:
        defaults = {field.encode_name: field.default for field in msgspec.structs.fields(LoadReport)}
        values["load"] = {
            name: value
            for name, value in values["load"].items()
            if name not in ("transfer_seconds", "weight_version") and value != defaults[name]
        }
    return msgspec.json.encode(values).decode()


def read_facts(topology: Mapping[str, str]) -> InstanceFacts | None:
    """The facts in a record's or a listing's topology map; None when there are none that can be read."""
    text = topology.get(FACTS_KEY)
    if text is None:
        return None
    try:
        return decode_json(text, InstanceFacts)
    except ValueError:
        return None


def worker_tensors(worker: p2p_pb2.WorkerMetadata) -> Sequence[p2p_pb2.TensorDescriptor]:
    """A record's tensors: those of its payload when it has one, else those in the field of 0.3."""
    payload = worker.WhichOneof("source_payload")
    if payload is None:
        return worker.tensors
    return worker.tensor_source.tensors if payload == "tensor_source" else ()


def read_source(response: p2p_pb2.GetMetadataResponse) -> SourceRecord:
    """The source in an answer whose `found` is set."""
    worker = response.worker
    url = worker.metadata_endpoint
    return SourceRecord(
        source_id=response.mx_source_id,
        worker_id=response.worker_id,
        worker_rank=worker.worker_rank,
        status=worker.status,
        updated_at=worker.updated_at,
        session_id=worker.transfer_engine_session_id,
        tensors=tuple(
            SourceTensor(t.name, t.addr, t.size, t.dtype.removeprefix(DTYPE_PREFIX), t.device_id)
            for t in worker_tensors(worker)
        ),
        accelerator=worker.accelerator,
        info_url=url if url.startswith(("http://", "https://")) else "",
        facts=read_facts(worker.topology),
    )
