"""Listings that come together share one read of Redis, and none is answered by a read that began before it came."""

import asyncio
from collections.abc import Callable

import pytest
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.server.redis_layout import StoredRecord
from ramet.srt.modelexpress.server.redis_reading import KnownSource, RecordCache
from ramet.srt.modelexpress.server.redis_store import RedisStore
from ramet.srt.modelexpress.server.store import Source, StoreError


def record_of(size: int) -> StoredRecord:
    return StoredRecord(encoded=bytes(size), status=0, updated_at=0)


def test_the_records_asked_for_last_are_kept_as_far_as_they_fit() -> None:
    cache = RecordCache(limit_bytes=40)
    for name in (b"a", b"b", b"b", b"c"):
        cache.put(name, record_of(12))
    assert cache.get(b"a")
    cache.put(b"d", record_of(12))
    assert [name for name in (b"a", b"b", b"c", b"d") if cache.get(name)] == [b"a", b"c", b"d"]
    cache.put(b"giant", record_of(100))
    assert not any(cache.get(name) for name in (b"a", b"c", b"d", b"giant"))
    cache.put(b"e", record_of(39))
    assert cache.get(b"e")


class GatedStore(RedisStore):
    """Each read ends when it is told to, with its number as the source's id."""

    def __init__(self) -> None:
        super().__init__("redis://127.0.0.1:1")
        self.gates: list[asyncio.Future[None]] = []

    async def _read(self, source_id: str | None) -> list[Source]:
        number = len(self.gates)
        self.gates.append(asyncio.get_running_loop().create_future())
        await self.gates[number]
        return [Source(str(number), p2p_pb2.SourceIdentity(), [])]


async def settle(condition: Callable[[], bool]) -> None:
    """Let the tasks run until it is true."""
    for _ in range(100):
        if condition():
            return
        await asyncio.sleep(0)
    pytest.fail("the condition did not come true")


async def list_ids(store: RedisStore, source_id: str | None = "a") -> list[str]:
    return [source.source_id for source in await store.sources(source_id)]


async def test_who_comes_during_a_read_shares_the_next_one() -> None:
    store = GatedStore()
    first = asyncio.create_task(list_ids(store))
    await settle(lambda: len(store.gates) == 1)
    later = [asyncio.create_task(list_ids(store)) for _ in range(5)]
    other = asyncio.create_task(list_ids(store, None))
    await settle(lambda: len(store.gates) == 2)  # the other one need not wait
    store.gates[0].set_result(None)
    assert await first == ["0"]
    await settle(lambda: len(store.gates) == 3)
    assert not any(task.done() for task in later)
    latest = asyncio.create_task(list_ids(store))
    later[0].cancel()  # its caller has given up; the others have not
    store.gates[2].set_result(None)
    assert await asyncio.gather(*later[1:]) == [["2"]] * 4
    await settle(lambda: len(store.gates) == 4)
    for gate in (store.gates[1], store.gates[3]):
        gate.set_result(None)
    assert (await other, await latest) == (["1"], ["3"])
    assert not store._running and not store._queued
    await store.close()


async def test_a_read_that_fails_is_told_to_all_and_forgotten() -> None:
    store = GatedStore()
    tasks = [asyncio.create_task(list_ids(store)) for _ in range(2)]
    await settle(lambda: len(store.gates) == 1)
    store.gates[0].set_exception(StoreError("Redis is away"))
    assert [str(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == ["Redis is away"] * 2
    again = asyncio.create_task(list_ids(store))
    await settle(lambda: len(store.gates) == 2)
    store.gates[1].set_result(None)
    assert await again == ["1"]
    await store.close()


def test_what_is_there_in_the_same_words_is_not_decoded_again() -> None:
    words = ['{"worker_rank":0,"status":2,"updated_at":1}', '{"worker_rank":0,"status":3,"updated_at":2}']
    first = KnownSource("a", '{"model_name":"m"}', ["w", words[0], "v", words[0]], None)
    second = KnownSource("a", '{"model_name":"m"}', ["w", words[0], "v", words[1]], first)
    assert second.identity is first.identity
    assert second.rows["w", words[0]] is first.rows["w", words[0]]
    assert [(row.worker_id, row.status) for row in second.rows.values()] == [("w", 2), ("v", 3)]
    assert KnownSource("a", '{"model_name":"n"}', [], second).identity.model_name == "n"
