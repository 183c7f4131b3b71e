"""Owns the fleet as data: which instances serve which model, how they are, and who took its weights from whom."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache

import msgspec

from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import FACTS_KEY, InstanceFacts, read_facts
from ramet.srt.modelexpress.server.load_history import MAX_FACTS_LEN, Load, LoadHistory, Taking
from ramet.srt.modelexpress.server.row_ages import RowAges
from ramet.srt.modelexpress.server.store import MetadataStore, Row, Source
from ramet.srt.modelexpress.source_identity import CLAIM_PARAMETER, ROLE_PARAMETER

ACTIVE = (p2p_pb2.SOURCE_STATUS_READY, p2p_pb2.SOURCE_STATUS_INITIALIZING)
SILENT = "SILENT"  # shown for an active worker that has missed its heartbeats and waits for the reaper
STALE = "STALE"
MISSED_BEATS = 3  # after which a worker is silent
MIN_SILENCE_S = 8.0  # a busy host may hold a beat back for so long
SILENCE_SLACK_S = 1.0
STATUS_NAMES = {value: name.removeprefix("SOURCE_STATUS_") for name, value in p2p_pb2.SourceStatus.items()}


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
    status: str  # of the whole instance; STALE ones have ended, sleep, or change their weights
    metrics_url: str  # "" where nothing is known of one
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
    num_loads: int  # that were ever noted; /loads.json has something new when it grows
    models: list[Model]
    claims: list[Claim]


class Loads(msgspec.Struct, kw_only=True):
    """What /loads.json answers."""

    num_loads: int  # that were ever noted
    loads: list[Load]


class Fleet:
    """Makes snapshots of a store.

    Args:
        heartbeat_timeout_s: after which a worker is silent that does not say how often it beats.
        target_of: what to say of the target of a model.
    """

    def __init__(
        self,
        store: MetadataStore,
        ages: RowAges,
        history: LoadHistory,
        heartbeat_timeout_s: float,
        target_of: Callable[[str], str] = lambda _model: "",
    ):
        self._target_of = target_of
        self._store = store
        self._ages = ages
        self._history = history
        self._heartbeat_timeout_s = heartbeat_timeout_s

    async def snapshot(self) -> Snapshot:
        """The fleet now.

        Raises:
            StoreError: if the store cannot be read.
        """
        models, claims = [], []
        for source, facts in await self._sources():
            if CLAIM_PARAMETER in source.identity.extra_parameters:
                pairs = zip(source.rows, facts, strict=True)
                claims += [self._make_claim(source, row, fact) for row, fact in pairs if row.status in ACTIVE]
            else:
                models.append(self._make_model(source, facts))
        return Snapshot(
            time=time.time(),
            store=self._store.name,
            heartbeat_timeout_s=self._heartbeat_timeout_s,
            num_loads=self._history.num_noted,
            models=sorted(models, key=lambda model: (model.model_name.lower(), model.source_id)),
            claims=sorted(claims, key=lambda claim: (claim.model_name.lower(), claim.instance)),
        )

    async def loads(self, after: int) -> Loads:
        """Who took weights from whom, in the order of time, as far as it was noted after the first `after`.

        Raises:
            StoreError: if the store cannot be read.
        """
        await self._sources()
        return Loads(num_loads=self._history.num_noted, loads=self._history.loads(after))

    async def _sources(self) -> list[tuple[Source, list[InstanceFacts | None]]]:
        """All sources with what their rows' records say of instances, which the history has noted."""
        found = []
        for source in await self._store.sources():
            facts = [read_known_facts(row.topology) for row in source.rows]
            if CLAIM_PARAMETER not in source.identity.extra_parameters:
                for row, fact in zip(source.rows, facts, strict=True):
                    self._history.note(source.identity.model_name, row.worker_id, row.worker_rank, fact)
            found.append((source, facts))
        return found

    def _make_model(self, source: Source, facts: list[InstanceFacts | None]) -> Model:
        identity = source.identity
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
            instances=self._make_instances(source, facts),
        )

    def _make_instances(self, source: Source, facts: list[InstanceFacts | None]) -> list[Instance]:
        """What was started anew at an address is another instance than the one before, which has gone then."""
        found: dict[tuple[str, int], list[tuple[Row, InstanceFacts | None]]] = {}  # by name, and how many came since
        since: Counter[tuple[str, int]] = Counter()
        for row, fact in sorted(zip(source.rows, facts, strict=True), key=start_of, reverse=True):
            # The nodes of an instance start at different times: one of its ranks is there twice only if it came again.
            rank = (fact.instance, fact.world_rank) if fact else (row.worker_id, row.worker_rank)
            found.setdefault((rank[0], since[rank]), []).append((row, fact))
            since[rank] += 1
        instances = [self._make_instance(name, pairs, num_since > 0) for (name, num_since), pairs in found.items()]
        return sorted(instances, key=lambda instance: (instance.started_at or 0, instance.name))

    def _make_instance(self, name: str, pairs: list[tuple[Row, InstanceFacts | None]], has_gone: bool) -> Instance:
        pairs.sort(key=lambda pair: (pair[0].worker_rank, pair[0].worker_id))
        workers = [self._make_worker(row, fact) for row, fact in pairs]
        first = pairs[0][1]
        return Instance(
            name=name,
            host=first.host if first else "",
            started_at=(first.started_at or None) if first else None,
            status=STALE if has_gone else status_of([worker.status for worker in workers]),
            metrics_url=name.rstrip("/") + "/metrics" if name.startswith(("http://", "https://")) else "",
            workers=workers,
        )

    def _make_worker(self, row: Row, facts: InstanceFacts | None) -> Worker:
        age_s = self._ages.row_age_s(row)
        is_silent = row.status in ACTIVE and age_s > self._silent_after_s(facts)
        return Worker(
            worker_id=row.worker_id,
            worker_rank=row.worker_rank,
            world_rank=facts.world_rank if facts else None,
            status=SILENT if is_silent else STATUS_NAMES.get(row.status, "UNKNOWN"),
            age_s=age_s,
            load=row.source_load,
            accelerator=row.accelerator,
            layout_signature=facts.layout_signature if facts else "",
            weight_version=facts.weight_version if facts else "",
            taking=self._history.taking(facts),
        )

    def _silent_after_s(self, facts: InstanceFacts | None) -> float:
        """How old a worker's last heartbeat may be."""
        if facts is None or facts.heartbeat_s <= 0:
            return self._heartbeat_timeout_s
        silence_s = MISSED_BEATS * facts.heartbeat_s + SILENCE_SLACK_S
        return min(self._heartbeat_timeout_s, max(MIN_SILENCE_S, silence_s))

    def _make_claim(self, source: Source, row: Row, facts: InstanceFacts | None) -> Claim:
        return Claim(
            model_name=source.identity.model_name,
            instance=facts.instance if facts else row.worker_id,
            age_s=self._ages.row_age_s(row),
        )


def start_of(pair: tuple[Row, InstanceFacts | None]) -> float:
    """When the instance of a worker was started, by its own clock; 0 where that isn't known."""
    return pair[1].started_at if pair[1] else 0.0


def status_of(statuses: list[str]) -> str:
    """The status of an instance whose workers have these: what it lacks most."""
    if SILENT in statuses:
        return SILENT
    if all(status == statuses[0] for status in statuses):
        return statuses[0]
    return "INITIALIZING" if "INITIALIZING" in statuses else next(one for one in statuses if one != "READY")


def read_known_facts(topology: Mapping[str, str]) -> InstanceFacts | None:
    """As `read_facts`; a text that was read lately is not decoded again."""
    text = topology.get(FACTS_KEY)
    return read_facts(topology) if text is None or len(text) > MAX_FACTS_LEN else decode_facts(text)


@lru_cache(maxsize=16_384)
def decode_facts(text: str) -> InstanceFacts | None:
    """The facts with that text in a record."""
    return read_facts({FACTS_KEY: text})
