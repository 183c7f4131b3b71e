"""Owns the store in Redis, in the reference server's layout (redis_layout.py): several servers may share it."""

import asyncio
import logging
from collections import OrderedDict
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
from ramet.srt.modelexpress.server.store import Row, Source, StoredWorker, StoreError
from ramet.srt.modelexpress.source_identity import compute_source_id

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 32
CACHED_BYTES = 64 << 20

T = TypeVar("T")

SUMMARY_DECODER = msgspec.json.Decoder(layout.SummaryJson)

# The live summary of a rank: its own field, or for records of the first reference servers, what the record says.
LIVE_SUMMARY = """
local function live_summary(key, rank)
  local text = redis.call('HGET', key, 'status:' .. rank)
  if text then return text end
  local record = cjson.decode(redis.call('HGET', key, rank))
  return cjson.encode({worker_rank = record.worker_rank, status = record.status or 0,
                       updated_at = record.updated_at or 0, accelerator = record.accelerator or ''})
end
local function ranks(key)
  local found = {}
  for _, field in ipairs(redis.call('HKEYS', key)) do
    if string.sub(field, 1, 7) ~= 'status:' then found[#found + 1] = field end
  end
  return found
end
"""

# KEYS: source keys. Answers one text per source: a msgpack array of its attributes, and then worker id and summary, in
# turns, of every rank. Packed, a thousand rows cost Redis a quarter of the time that joining them by Lua's
# table.concat takes, and they are read much faster than a thousand texts. A worker with one rank, the usual case, costs
# no look into its record.
LIST = (
    LIVE_SUMMARY
    + """
local answer = {}
for _, source in ipairs(KEYS) do
  local fields, rows = redis.call('HGETALL', source), {''}
  local function add(worker_id, summary)
    rows[#rows + 1] = worker_id
    rows[#rows + 1] = summary
  end
  for i = 1, #fields, 2 do
    local worker_id, summary = fields[i], fields[i + 1]
    if worker_id == '__attributes__' then
      rows[1] = summary
    else
      local key = source .. ':' .. worker_id
      local size = redis.call('HLEN', key)
      if size > 0 and size <= 2 and string.sub(summary, 1, 1) == '{' then
        add(worker_id, summary)
      elseif size > 0 then
        for _, rank in ipairs(ranks(key)) do
          local is_readable, live = pcall(live_summary, key, rank)
          if is_readable then add(worker_id, live) end
        end
      end
    end
  end
  answer[#answer + 1] = cmsgpack.pack(rows)
end
return answer
"""
)

# KEYS: worker, source. ARGV: worker id, rank, new status, new time, new load or '', and, unless '', the status and time
# that the record must still have. Answers whether the record was there and changed.
UPDATE = (
    LIVE_SUMMARY
    + """
if redis.call('HEXISTS', KEYS[1], ARGV[2]) == 0 then return 0 end
local summary = cjson.decode(live_summary(KEYS[1], ARGV[2]))
if ARGV[6] ~= '' and (summary.status ~= tonumber(ARGV[6]) or summary.updated_at ~= tonumber(ARGV[7])) then return 0 end
summary.status = tonumber(ARGV[3])
summary.updated_at = tonumber(ARGV[4])
summary.source_load = tonumber(ARGV[5])
local text = cjson.encode(summary)
redis.call('HSET', KEYS[1], 'status:' .. ARGV[2], text)
local shown = redis.call('HGET', KEYS[2], ARGV[1])
local shown_rank = nil
if shown then
  shown_rank = tonumber(shown)
  if string.sub(shown, 1, 1) == '{' then shown_rank = cjson.decode(shown).worker_rank end
end
if shown_rank == nil or shown_rank == tonumber(ARGV[2]) then redis.call('HSET', KEYS[2], ARGV[1], text) end
return 1
"""
)

# KEYS: worker, source. ARGV: worker id, rank, and the status and time that the record must still have.
REMOVE = (
    LIVE_SUMMARY
    + """
if redis.call('HEXISTS', KEYS[1], ARGV[2]) == 0 then return 0 end
local summary = cjson.decode(live_summary(KEYS[1], ARGV[2]))
if summary.status ~= tonumber(ARGV[3]) or summary.updated_at ~= tonumber(ARGV[4]) then return 0 end
redis.call('HDEL', KEYS[1], ARGV[2], 'status:' .. ARGV[2])
local left = ranks(KEYS[1])
if #left > 0 then
  redis.call('HSET', KEYS[2], ARGV[1], live_summary(KEYS[1], left[1]))
else
  redis.call('DEL', KEYS[1])
  redis.call('HDEL', KEYS[2], ARGV[1])
end
local size = redis.call('HLEN', KEYS[2])
local attributes = redis.call('HEXISTS', KEYS[2], '__attributes__')
if size <= attributes then redis.call('DEL', KEYS[2]) end
return 1
"""
)


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


def unpack_texts(data: bytes) -> list[str]:
    """The texts that LIST packed; one that is not UTF-8 is empty."""
    try:
        return msgspec.msgpack.decode(data, type=list[str])
    except ValueError:
        return [decode_text(raw) for raw in msgspec.msgpack.decode(data, type=list[msgspec.Raw])]


def decode_text(raw: msgspec.Raw) -> str:
    try:
        return msgspec.msgpack.decode(raw, type=str)
    except ValueError:
        return ""


class RecordCache:
    """The records that were asked for last, by their text: many clients ask for the few sources that are idle.

    Args:
        limit_bytes: that texts and records may have together.
    """

    def __init__(self, limit_bytes: int):
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        self._records: OrderedDict[bytes, layout.StoredRecord] = OrderedDict()  # the one used last at the end

    def get(self, text: bytes) -> layout.StoredRecord | None:
        record = self._records.get(text)
        if record is not None:
            self._records.move_to_end(text)
        return record

    def put(self, text: bytes, record: layout.StoredRecord) -> None:
        """Keep it, and let go of as many old ones as that takes."""
        if text not in self._records:
            self._num_bytes += len(text) + len(record.encoded)
        self._records[text] = record
        while self._num_bytes > self._limit_bytes:
            old_text, old = self._records.popitem(last=False)
            self._num_bytes -= len(old_text) + len(old.encoded)


class KnownSource:
    """A source as it was read last. What is there again in the same words is not decoded again.

    Args:
        attributes: of the source, as JSON.
        texts: worker id and summary, in turns, of every rank. What cannot be read is left out.
        last: the source as it was read before.
    """

    def __init__(self, source_id: str, attributes: str, texts: list[str], last: "KnownSource | None"):
        self.attributes = attributes
        self.rows: dict[tuple[str, str], Row] = {}  # by worker id and summary
        self.identity: p2p_pb2.SourceIdentity
        if last is not None and last.attributes == attributes:
            self.identity = last.identity
        else:
            self.identity = read_identity(source_id, attributes)
        known = {} if last is None else last.rows
        for key in zip(texts[::2], texts[1::2], strict=True):
            row = known.get(key) or read_row(source_id, *key)
            if row is not None:
                self.rows[key] = row


def read_identity(source_id: str, attributes: str) -> p2p_pb2.SourceIdentity:
    """The identity in a source's attributes; an empty one if it cannot be read."""
    try:
        return layout.decode_identity(attributes.encode())
    except ValueError:
        logger.warning("the identity of source %s in Redis cannot be read", source_id)
        return p2p_pb2.SourceIdentity()


def read_row(source_id: str, worker_id: str, summary: str) -> Row | None:
    """The row of a worker with that summary; None if it cannot be read."""
    try:
        if not worker_id:
            raise ValueError("its name is no text")
        return make_row(source_id, worker_id, SUMMARY_DECODER.decode(summary))
    except ValueError:
        logger.warning("the row of worker %s of source %s in Redis cannot be read", worker_id, source_id)
        return None


def make_row(source_id: str, worker_id: str, summary: layout.SummaryJson) -> Row:
    return Row(
        source_id=source_id,
        worker_id=worker_id,
        worker_rank=summary.worker_rank,
        status=summary.status,
        updated_at=summary.updated_at,
        accelerator=summary.accelerator,
        source_load=summary.source_load if isinstance(summary.source_load, float) else None,
        topology=summary.topology,
    )


def redact(url: str) -> str:
    """A Redis URL without its user and password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"
