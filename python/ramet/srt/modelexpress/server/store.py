"""Owns what a metadata store offers to the service, and the store in memory. The store in Redis is redis_store.py."""

import asyncio
import re
import zlib
from collections.abc import Mapping
from typing import Protocol

import msgspec

from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import worker_tensors
from ramet.srt.modelexpress.source_identity import compute_source_id

MAX_RECORDS = 100_000
MAX_STORED_BYTES = 1 << 30  # in the memory of the server


class StoreError(Exception):
    """The store cannot be reached or holds something that it cannot read. Its text says why."""


class Row(msgspec.Struct, kw_only=True):
    """What a listing shows of one rank's record."""

    source_id: str
    worker_id: str
    worker_rank: int
    status: int
    updated_at: int  # unix milliseconds
    accelerator: str = ""
    source_load: float | None = None
    topology: Mapping[str, str] = {}
    encoded: tuple[p2p_pb2.SourceIdentity, bytes] | None = None  # what encode_ref answered last

    def encode_ref(self, identity: p2p_pb2.SourceIdentity) -> bytes:
        """The serialized SourceInstanceRef of this row of a source with that identity."""
        if self.encoded is None or self.encoded[0] is not identity:
            self.encoded = (identity, self._make_ref(identity).SerializeToString())
        return self.encoded[1]

    def _make_ref(self, identity: p2p_pb2.SourceIdentity) -> p2p_pb2.SourceInstanceRef:
        return p2p_pb2.SourceInstanceRef(
            mx_source_id=self.source_id,
            worker_id=self.worker_id,
            model_name=identity.model_name,
            worker_rank=self.worker_rank,
            accelerator=self.accelerator,
            updated_at=self.updated_at,
            training_step=training_step(identity),
            layout_signature=identity.extra_parameters.get("layout_signature") or None,
            topology=self.topology,
            source_load=self.source_load,
        )


def training_step(identity: p2p_pb2.SourceIdentity) -> int | None:
    """The step that a trainer published with its identity, under either of the two names that are in use."""
    parameters = identity.extra_parameters
    text = parameters["training_step"] if "training_step" in parameters else parameters.get("version", "")
    return int(text) if re.fullmatch("[0-9]{1,20}", text) and int(text) < 2**64 else None


class Source(msgspec.Struct):
    """One source, and the rows of all ranks of all workers that publish it."""

    source_id: str
    identity: p2p_pb2.SourceIdentity
    rows: list[Row]


class StoredWorker(msgspec.Struct, frozen=True):
    """A record and the identity under which it was published."""

    identity: p2p_pb2.SourceIdentity | None
    worker: bytes  # a WorkerMetadata on the wire


class MetadataStore(Protocol):
    """Records by (source id, worker id, rank). Every method may raise StoreError; what returned is stored."""

    name: str  # shown on the fleet page

    async def publish(self, identity: p2p_pb2.SourceIdentity, worker_id: str, worker: p2p_pb2.WorkerMetadata) -> str:
        """Replace the whole record of this rank, leave the worker's other ranks alone, and return the source id."""

    async def sources(self, source_id: str | None = None) -> list[Source]:
        """The source with that id, if there is one; or all sources."""

    async def get(self, source_id: str, worker_id: str) -> StoredWorker | None:
        """The worker's record; that of its lowest rank if it has several."""

    async def update_status(
        self, source_id: str, worker_id: str, worker_rank: int, status: int, updated_at: int, load: float | None
    ) -> bool:
        """Set a record's status, time and load (None: unknown). False, and nothing is made, if there is no record."""

    async def mark_stale(self, row: Row, updated_at: int) -> bool:
        """Set the record to STALE if it is still as `row` has it."""

    async def remove(self, row: Row) -> bool:
        """Remove the record if it is still as `row` has it, and its source if that was the last one."""

    async def close(self) -> None:
        """Let go of connections."""


class _Record:
    """A row, and the record packed: without tensors, and its tensors compressed (names repeat, so to about a sixth)."""

    __slots__ = ("row", "head", "tensors")

    def __init__(self, row: Row, worker: p2p_pb2.WorkerMetadata):
        self.row = row
        self.tensors = b""
        if worker.WhichOneof("source_payload") != "artifact_source":
            tensors = p2p_pb2.TensorSourceMetadata(tensors=worker_tensors(worker))
            self.tensors = zlib.compress(tensors.SerializeToString(), 1)
            worker.ClearField("tensor_source")
        worker.ClearField("tensors")
        self.head = worker.SerializeToString()

    @property
    def nbytes(self) -> int:
        """About what it takes."""
        topology = sum(len(key) + len(value) for key, value in self.row.topology.items())
        return len(self.head) + len(self.tensors) + topology

    def unpack(self) -> bytes:
        worker = p2p_pb2.WorkerMetadata.FromString(self.head)
        worker.status, worker.updated_at = self.row.status, self.row.updated_at
        if self.tensors:
            worker.tensor_source.SetInParent()
            worker.tensor_source.MergeFromString(zlib.decompress(self.tensors))
            worker.tensors.MergeFrom(worker.tensor_source.tensors)
        return worker.SerializeToString()


class _Entry:
    """A source and the records of its workers, by worker id and rank."""

    __slots__ = ("identity", "records")

    def __init__(self, identity: p2p_pb2.SourceIdentity):
        self.identity = identity
        self.records: dict[tuple[str, int], _Record] = {}


class MemoryStore:
    """Records in this process, gone with it. Use it from one event loop: what changes it does so without waiting."""

    name = "memory"

    def __init__(self) -> None:
        self._sources: dict[str, _Entry] = {}
        self._num_records = self._nbytes = 0

    async def publish(self, identity: p2p_pb2.SourceIdentity, worker_id: str, worker: p2p_pb2.WorkerMetadata) -> str:
        source_id = compute_source_id(identity)
        row = Row(
            source_id=source_id,
            worker_id=worker_id,
            worker_rank=worker.worker_rank,
            status=worker.status,
            updated_at=worker.updated_at,
            accelerator=worker.accelerator,
            topology=dict(worker.topology),
        )
        record = await asyncio.to_thread(_Record, row, worker)  # packing 50 MB takes a while
        self._make_room(source_id, (worker_id, row.worker_rank), record)
        own_identity = p2p_pb2.SourceIdentity()
        own_identity.CopyFrom(identity)  # a part of a message keeps the memory of all of it
        source = self._sources.setdefault(source_id, _Entry(own_identity))
        source.identity = own_identity
        source.records[worker_id, row.worker_rank] = record
        return source_id

    def _make_room(self, source_id: str, key: tuple[str, int], record: _Record) -> None:
        """Raises StoreError if a record can't be kept in place of the one, if any, that the rank had."""
        entry = self._sources.get(source_id)
        before = entry.records.get(key) if entry else None
        num_records = self._num_records + (before is None)
        nbytes = self._nbytes + record.nbytes - (before.nbytes if before else 0)
        if num_records > MAX_RECORDS or nbytes > MAX_STORED_BYTES:
            raise StoreError(
                f"the server is full: {self._num_records} records of {self._nbytes} bytes (at most {MAX_RECORDS} of "
                f"{MAX_STORED_BYTES})"
            )
        self._num_records, self._nbytes = num_records, nbytes

    async def sources(self, source_id: str | None = None) -> list[Source]:
        selected = self._sources if source_id is None else {source_id: self._sources.get(source_id)}
        return [
            Source(key, source.identity, [record.row for record in source.records.values()])
            for key, source in selected.items()
            if source is not None
        ]

    async def get(self, source_id: str, worker_id: str) -> StoredWorker | None:
        source = self._sources.get(source_id)
        records = source.records if source else {}
        ranks = [rank for worker, rank in records if worker == worker_id]
        if source is None or not ranks:
            return None
        record = records[worker_id, min(ranks)]
        return StoredWorker(source.identity, await asyncio.to_thread(record.unpack))

    async def update_status(
        self, source_id: str, worker_id: str, worker_rank: int, status: int, updated_at: int, load: float | None
    ) -> bool:
        source = self._sources.get(source_id)
        record = source.records.get((worker_id, worker_rank)) if source else None
        if record is None:
            return False
        record.row = msgspec.structs.replace(
            record.row, status=status, updated_at=updated_at, source_load=load, encoded=None
        )
        return True

    async def mark_stale(self, row: Row, updated_at: int) -> bool:
        if not self._is_current(row):
            return False
        key = (row.source_id, row.worker_id, row.worker_rank)
        return await self.update_status(*key, p2p_pb2.SOURCE_STATUS_STALE, updated_at, row.source_load)

    async def remove(self, row: Row) -> bool:
        if not self._is_current(row):
            return False
        source = self._sources[row.source_id]
        self._num_records -= 1
        self._nbytes -= source.records[row.worker_id, row.worker_rank].nbytes
        del source.records[row.worker_id, row.worker_rank]
        if not source.records:
            del self._sources[row.source_id]
        return True

    async def close(self) -> None:
        self._sources.clear()
        self._num_records = self._nbytes = 0

    def _is_current(self, row: Row) -> bool:
        source = self._sources.get(row.source_id)
        record = source.records.get((row.worker_id, row.worker_rank)) if source else None
        return record is not None and (record.row.status, record.row.updated_at) == (row.status, row.updated_at)
