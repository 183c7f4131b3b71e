"""Owns the store in Redis, in the reference server's layout (redis_layout.py): several servers may share it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.server import redis_layout as layout
from ramet.srt.modelexpress.server.redis_reading import KnownSource, RecordCache, unpack_texts
from ramet.srt.modelexpress.server.redis_scripts import LIST, REMOVE, UPDATE
from ramet.srt.modelexpress.server.store import Row, Source, StoredWorker, StoreError
from ramet.srt.modelexpress.source_identity import compute_source_id

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 32
CACHED_BYTES = 64 << 20

T = TypeVar("T")


class RedisStore:
    """Records in Redis. What a method has returned from is in Redis; how durable that is, Redis's settings say.

    A connection that has gone is made anew for the next call, so Redis may go away and come back. Every change is one
    transaction or one script, and may be repeated.
    """

    def __init__(self, url: str):
        """
        Args:
            url: redis://[user:password@]host[:port][/database], rediss://… or unix://path.

        Raises:
            ValueError: if it is not such a URL.
        """
        self.name = f"redis at {redact(url)}"
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=ANSWER_TIMEOUT_S,
            socket_timeout=ANSWER_TIMEOUT_S,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            retry=Retry(ConstantBackoff(0.05), 1),
            retry_on_error=[exceptions.ConnectionError, exceptions.TimeoutError],
        )
        self._redis = redis.asyncio.Redis.from_pool(pool)
        self._list = self._redis.register_script(LIST)
        self._update = self._redis.register_script(UPDATE)
        self._remove = self._redis.register_script(REMOVE)
        self._known: dict[str, KnownSource] = {}  # by source id
        self._records = RecordCache(CACHED_BYTES)
        # Reads of one source, or of all (None): the one that is going on, and the one that comes after it.
        self._running: dict[str | None, asyncio.Task[list[Source]]] = {}
        self._queued: dict[str | None, asyncio.Task[list[Source]]] = {}

    async def publish(self, identity: p2p_pb2.SourceIdentity, worker_id: str, worker: p2p_pb2.WorkerMetadata) -> str:
        if worker_id == layout.ATTRIBUTES:
            raise StoreError(f"the worker id {layout.ATTRIBUTES} is reserved")
        source_id = compute_source_id(identity)
        record = await asyncio.to_thread(layout.encode_record, worker)  # encoding 50 MB takes a while
        summary = layout.encode_summary(worker)
        rank = worker.worker_rank

        async def store() -> None:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(
                    layout.worker_key(source_id, worker_id), mapping={str(rank): record, f"status:{rank}": summary}
                )
                pipe.hset(
                    layout.source_key(source_id),
                    mapping={layout.ATTRIBUTES: layout.encode_identity(identity), worker_id: summary},
                )
                await pipe.execute()

        await guard(store)
        return source_id

    async def sources(self, source_id: str | None = None) -> list[Source]:
        # Whoever comes while a read is going on waits for the next one, together with all others that come meanwhile:
        # it begins after they came, so it shows all that was acknowledged before.
        queued = self._queued.get(source_id)
        if queued is None:
            queued = asyncio.create_task(self._read_next(source_id, self._running.get(source_id)))
            self._queued[source_id] = queued
        return await asyncio.shield(queued)  # the others still want it when one gives up

    async def _read_next(self, source_id: str | None, running: asyncio.Task[list[Source]] | None) -> list[Source]:
        """Read once `running`, which reads the same, has ended."""
        if running is not None:
            await asyncio.wait((running,))
        task = self._running[source_id] = self._queued.pop(source_id)
        try:
            return await self._read(source_id)
        finally:
            if self._running[source_id] is task:
                del self._running[source_id]

    async def _read(self, source_id: str | None) -> list[Source]:
        async def read() -> tuple[list[str], list[bytes]]:
            keys = [layout.source_key(source_id)] if source_id is not None else await self._source_keys()
            return keys, await self._list(keys=keys) if keys else []

        keys, packed = await guard(read)
        ids = [key.removeprefix(layout.SOURCE_PREFIX) for key in keys]
        if source_id is None:
            present = set(ids)
            self._known = {key: known for key, known in self._known.items() if key in present}
        found = []
        for key, data in zip(ids, packed, strict=True):
            attributes, *texts = unpack_texts(data)
            if attributes or texts:
                known = self._known[key] = KnownSource(key, attributes, texts, self._known.get(key))
                found.append(Source(key, known.identity, list(known.rows.values())))
            else:
                self._known.pop(key, None)
        return found

    async def _source_keys(self) -> list[str]:
        found = {
            key.decode(errors="replace") async for key in self._redis.scan_iter(match=layout.SOURCE_PATTERN, count=1000)
        }
        return sorted(found)

    async def get(self, source_id: str, worker_id: str) -> StoredWorker | None:
        async def read() -> tuple[dict[bytes, bytes], bytes | None]:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hgetall(layout.worker_key(source_id, worker_id))
                pipe.hget(layout.source_key(source_id), layout.ATTRIBUTES)
                return tuple(await pipe.execute())

        fields, attributes = await guard(read)
        ranks = sorted(int(field) for field in fields if field.isdigit())
        if not ranks:
            return None
        status = fields.get(b"status:%d" % ranks[0])
        try:
            summary = msgspec.json.decode(status, type=layout.SummaryJson) if status else None
            record = await self._decode_record(fields[b"%d" % ranks[0]])
            identity = layout.decode_identity(attributes) if attributes else None
            return StoredWorker(identity, record.encode_with(summary))
        except (ValueError, OverflowError) as error:  # msgspec.DecodeError is one of the former
            raise StoreError(f"the record of worker {worker_id} in Redis cannot be read: {error}") from error

    async def _decode_record(self, text: bytes) -> layout.StoredRecord:
        record = self._records.get(text)
        if record is None:
            record = await asyncio.to_thread(layout.decode_record, text)
            self._records.put(text, record)
        return record

    async def update_status(
        self, source_id: str, worker_id: str, worker_rank: int, status: int, updated_at: int, load: float | None
    ) -> bool:
        return await self._change(source_id, worker_id, worker_rank, status, updated_at, load, "", "")

    async def mark_stale(self, row: Row, updated_at: int) -> bool:
        status = p2p_pb2.SOURCE_STATUS_STALE
        key = (row.source_id, row.worker_id, row.worker_rank)
        return await self._change(*key, status, updated_at, row.source_load, row.status, row.updated_at)

    async def _change(
        self,
        source_id: str,
        worker_id: str,
        worker_rank: int,
        status: int,
        updated_at: int,
        load: float | None,
        old_status: int | str,
        old_updated_at: int | str,
    ) -> bool:
        keys = [layout.worker_key(source_id, worker_id), layout.source_key(source_id)]
        load_text = "" if load is None else repr(load)
        args: list[str | int] = [worker_id, worker_rank, status, updated_at, load_text, old_status, old_updated_at]
        return bool(await guard(lambda: self._update(keys=keys, args=args)))

    async def remove(self, row: Row) -> bool:
        keys = [layout.worker_key(row.source_id, row.worker_id), layout.source_key(row.source_id)]
        args: list[str | int] = [row.worker_id, row.worker_rank, row.status, row.updated_at]
        return bool(await guard(lambda: self._remove(keys=keys, args=args)))

    async def close(self) -> None:
        reads = [*self._running.values(), *self._queued.values()]
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        await self._redis.aclose(close_connection_pool=True)


async def guard(operation: Callable[[], Awaitable[T]]) -> T:
    """The operation's result; what Redis or the way to it has against it becomes a StoreError."""
    try:
        return await operation()
    except (exceptions.RedisError, OSError) as error:
        raise StoreError(f"Redis: {error or type(error).__name__}") from error


def redact(url: str) -> str:
    """A Redis URL without its user and password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"
