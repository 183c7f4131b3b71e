"""Workers that fall silent become stale, and are forgotten later; those that live are left alone."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from modelexpress_harness import make_identity, make_worker, running_redis
from ramet.srt.modelexpress.ages import wall_clock_ms
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.server.reaper import Reaper
from ramet.srt.modelexpress.server.row_ages import RowAges
from ramet.srt.modelexpress.server.server_metrics import ServerMetrics
from ramet.srt.modelexpress.server.store import MemoryStore, MetadataStore, Row

READY = p2p_pb2.SOURCE_STATUS_READY
STALE = p2p_pb2.SOURCE_STATUS_STALE
IDENTITY = make_identity()


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[MetadataStore]:
    if request.param == "memory":
        yield MemoryStore()
        return
    from ramet.srt.modelexpress.server.redis_store import RedisStore

    with running_redis(tmp_path) as redis:
        made = RedisStore(redis.url)
        yield made
        await made.close()


class Clocks:
    def __init__(self) -> None:
        self.monotonic_s = 0.0
        self.ages = RowAges(wall_clock_ms, lambda: self.monotonic_s)

    def reaper(self, store: MetadataStore) -> Reaper:
        return Reaper(store, self.ages, ServerMetrics(), heartbeat_timeout_s=90, gc_timeout_s=3600)


async def rows(store: MetadataStore) -> dict[str, Row]:
    return {row.worker_id: row for source in await store.sources() for row in source.rows}


async def test_silence_makes_stale_and_then_goes(store: MetadataStore) -> None:
    clocks = Clocks()
    for worker_id, status in [("ready", READY), ("starting", 1), ("unknown", 0), ("stale", STALE)]:
        await store.publish(IDENTITY, worker_id, make_worker(status=status))
    reaper = clocks.reaper(store)
    assert await reaper.reap() == (0, 0)
    clocks.monotonic_s += 91
    published = before = wall_clock_ms()
    while before == published:  # a record that is changed within its millisecond looks like one that is not
        before = wall_clock_ms()
    assert await reaper.reap() == (2, 0)
    seen = await rows(store)
    assert {worker_id: row.status for worker_id, row in seen.items()} == {
        "ready": STALE,
        "starting": STALE,
        "unknown": 0,
        "stale": STALE,
    }
    assert seen["ready"].updated_at >= before
    clocks.monotonic_s += 3520  # "stale" has been so for 3611 s, the others for less
    assert await reaper.reap() == (0, 1)
    clocks.monotonic_s += 100
    assert await reaper.reap() == (0, 2)
    assert set(await rows(store)) == {"unknown"}


async def test_the_last_record_takes_its_source_along(store: MetadataStore) -> None:
    source_id = await store.publish(IDENTITY, "w", make_worker(status=STALE, age_s=4000))
    assert await Clocks().reaper(store).reap() == (0, 1)
    assert await store.sources() == [] and await store.get(source_id, "w") is None


async def test_a_heartbeat_in_between_wins(store: MetadataStore) -> None:
    source_id = await store.publish(IDENTITY, "w", make_worker(status=READY, age_s=100))
    seen = (await rows(store))["w"]
    assert await store.update_status(source_id, "w", 0, READY, wall_clock_ms(), 0.5)
    assert not await store.mark_stale(seen, wall_clock_ms())
    assert not await store.remove(seen)
    assert (await rows(store))["w"].status == READY


async def test_one_rank_of_a_worker_can_go_alone(store: MetadataStore) -> None:
    for rank, age_s in ((0, 4000), (1, 0)):
        worker = make_worker(status=STALE, age_s=age_s)
        worker.worker_rank = rank
        source_id = await store.publish(IDENTITY, "w", worker)
    assert await Clocks().reaper(store).reap() == (0, 1)
    stored = await store.get(source_id, "w")
    assert stored is not None and p2p_pb2.WorkerMetadata.FromString(stored.worker).worker_rank == 1
    assert (await rows(store))["w"].worker_rank == 1


async def test_a_clock_that_jumps_harms_nobody(store: MetadataStore) -> None:
    """Publishers' clocks are off by hours both ways; the server's jumps a day ahead. Nobody who lives is lost."""
    monotonic_s, wall_ms = 0.0, wall_clock_ms()
    ages = RowAges(lambda: wall_ms, lambda: monotonic_s)
    reaper = Reaper(store, ages, ServerMetrics(), heartbeat_timeout_s=90, gc_timeout_s=3600)
    for worker_id, age_s in [("exact", 0), ("ahead", -7200)]:
        await store.publish(IDENTITY, worker_id, make_worker(status=READY, age_s=age_s))
    assert await reaper.reap() == (0, 0)
    wall_ms += 86_400_000
    assert await reaper.reap() == (0, 0)
    monotonic_s += 91
    assert await reaper.reap() == (2, 0)
