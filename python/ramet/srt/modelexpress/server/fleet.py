"""Owns the fleet as data: which instances serve which model, how they are, and who took its weights from whom."""

import time
from collections.abc import Callable
from itertools import zip_longest

import msgspec

from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import InstanceFacts, read_facts
from ramet.srt.modelexpress.server.row_ages import RowAges
from ramet.srt.modelexpress.server.store import MetadataStore, Row, Source
from ramet.srt.modelexpress.source_identity import CLAIM_PARAMETER, ROLE_PARAMETER

ACTIVE = (p2p_pb2.SOURCE_STATUS_READY, p2p_pb2.SOURCE_STATUS_INITIALIZING)
SILENT = "SILENT"  # shown for an active worker that has missed its heartbeats and waits for the reaper


class Giver(msgspec.Struct, kw_only=True):
    """A worker that gave weights. `instance` is "" once its record has gone."""

    worker_id: str
    instance: str
    worker_rank: int | None
    num_bytes: int | None  # that it gave, where that was said


class Taking(msgspec.Struct, kw_only=True):
    """How a worker came to its weights."""

    source: str
    num_bytes: int
    seconds: float
    gb_per_s: float | None
    verified: bool
    taken_from: list[Giver]
    fallback_reason: str


class Worker(msgspec.Struct, kw_only=True):
    worker_id: str
    worker_rank: int
    world_rank: int | None
    status: str  # UNKNOWN, INITIALIZING, READY, STALE or SILENT
    age_s: float  # since its last heartbeat
    load: float | None  # from 0, idle, to 1
    accelerator: str
    layout_signature: str
    weight_version: str  # "" where an engine does not say
    taking: Taking | None


class Instance(msgspec.Struct, kw_only=True):
    """The ranks of one instance. An engine that does not say which instance a worker belongs to has one per worker."""

    name: str
    host: str
    started_at: float | None  # unix seconds
    workers: list[Worker]


class Model(msgspec.Struct, kw_only=True):
    source_id: str
    model_name: str
    revision: str
    dtype: str
    quantization: str
    framework: str
    role: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel_size: int
    target: str  # the version that all of its instances shall serve, and how many do; "": none
    instances: list[Instance]


class Claim(msgspec.Struct, kw_only=True):
    """An instance that reads the files of a model, or is about to."""

    model_name: str
    instance: str
    age_s: float


class Snapshot(msgspec.Struct, kw_only=True):
    """What /fleet.json answers."""

    time: float  # unix seconds
    store: str
    heartbeat_timeout_s: float
    models: list[Model]
    claims: list[Claim]


class Fleet:
    """Makes snapshots of a store."""

    def __init__(
        self,
        store: MetadataStore,
        ages: RowAges,
        heartbeat_timeout_s: float,
        target_of: Callable[[str], str] = lambda _model: "",
    ):
        """
        Args:
            target_of: what to say of the target of a model.
        """
        self._target_of = target_of
        self._store = store
        self._ages = ages
        self._heartbeat_timeout_s = heartbeat_timeout_s

    async def snapshot(self) -> Snapshot:
        """The fleet now.

        Raises:
            StoreError: if the store cannot be read.
        """
        sources = await self._store.sources()
        facts = {id(row): read_facts(row.topology) for source in sources for row in source.rows}
        known = {row.worker_id: (row, facts[id(row)]) for source in sources for row in source.rows}
        models, claims = [], []
        for source in sources:
            if CLAIM_PARAMETER in source.identity.extra_parameters:
                claims += [self._make_claim(source, row, facts[id(row)]) for row in source.rows if row.status in ACTIVE]
            else:
                models.append(self._make_model(source, facts, known))
        return Snapshot(
            time=time.time(),
            store=self._store.name,
            heartbeat_timeout_s=self._heartbeat_timeout_s,
            models=sorted(models, key=lambda model: (model.model_name.lower(), model.source_id)),
            claims=sorted(claims, key=lambda claim: (claim.model_name.lower(), claim.instance)),
        )

    def _make_model(
        self,
        source: Source,
        facts: dict[int, InstanceFacts | None],
        known: dict[str, tuple[Row, InstanceFacts | None]],
    ) -> Model:
        identity = source.identity
        instances: dict[str, Instance] = {}
        for row in sorted(source.rows, key=lambda row: (row.worker_rank, row.worker_id)):
            fact = facts[id(row)]
            name = fact.instance if fact else row.worker_id
            instance = instances.setdefault(name, Instance(name=name, host="", started_at=None, workers=[]))
            if fact:
                instance.host, instance.started_at = fact.host, fact.started_at or None
            instance.workers.append(self._make_worker(row, fact, known))
        framework = p2p_pb2.BackendFramework.DESCRIPTOR.values_by_number.get(identity.backend_framework)
        return Model(
            source_id=source.source_id,
            model_name=identity.model_name,
            revision=identity.revision,
            dtype=identity.dtype,
            quantization=identity.quantization,
            framework=framework.name.removeprefix("BACKEND_FRAMEWORK_") if framework else "UNKNOWN",
            role=identity.extra_parameters.get(ROLE_PARAMETER, "target"),
            tensor_parallel_size=identity.tensor_parallel_size,
            pipeline_parallel_size=identity.pipeline_parallel_size,
            expert_parallel_size=identity.expert_parallel_size,
            target=self._target_of(identity.model_name),
            instances=sorted(instances.values(), key=lambda instance: (instance.started_at or 0, instance.name)),
        )

    def _make_worker(
        self, row: Row, facts: InstanceFacts | None, known: dict[str, tuple[Row, InstanceFacts | None]]
    ) -> Worker:
        age_s = self._ages.row_age_s(row)
        value = p2p_pb2.SourceStatus.DESCRIPTOR.values_by_number.get(row.status)
        status = value.name.removeprefix("SOURCE_STATUS_") if value else "UNKNOWN"
        if row.status in ACTIVE and age_s > self._heartbeat_timeout_s:
            status = SILENT
        return Worker(
            worker_id=row.worker_id,
            worker_rank=row.worker_rank,
            world_rank=facts.world_rank if facts else None,
            status=status,
            age_s=age_s,
            load=row.source_load,
            accelerator=row.accelerator,
            layout_signature=facts.layout_signature if facts else "",
            weight_version=facts.weight_version if facts else "",
            taking=make_taking(facts, known) if facts and facts.load else None,
        )

    def _make_claim(self, source: Source, row: Row, facts: InstanceFacts | None) -> Claim:
        return Claim(
            model_name=source.identity.model_name,
            instance=facts.instance if facts else row.worker_id,
            age_s=self._ages.row_age_s(row),
        )


def make_taking(facts: InstanceFacts, known: dict[str, tuple[Row, InstanceFacts | None]]) -> Taking:
    """How the worker with these facts, which say how it loaded, came to its weights."""
    load = facts.load
    assert load is not None
    givers = []
    for worker_id, num_bytes in zip_longest(load.taken_from, load.taken_bytes[: len(load.taken_from)]):
        row, giver = known.get(worker_id, (None, None))
        name = giver.instance if giver else worker_id if row else ""
        rank = row.worker_rank if row else None
        givers.append(Giver(worker_id=worker_id, instance=name, worker_rank=rank, num_bytes=num_bytes))
    return Taking(
        source=load.source,
        num_bytes=load.num_bytes,
        seconds=load.seconds,
        gb_per_s=load.num_bytes / load.seconds / 1e9 if load.seconds > 0 else None,
        verified=load.verified,
        taken_from=givers,
        fallback_reason=load.fallback_reason,
    )
