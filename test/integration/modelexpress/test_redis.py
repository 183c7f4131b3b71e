"""Records in a real Redis: shared by servers, there after a restart, and safe while Redis is away."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
from modelexpress_harness import (
    RedisProcess,
    make_identity,
    make_worker,
    open_client,
    running_redis,
    running_server,
    wait_until,
)
from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.server import redis_layout
from ramet.srt.modelexpress.server.redis_store import RedisStore

READY = p2p_pb2.SOURCE_STATUS_READY


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    with running_redis(tmp_path) as running:
        yield running


def test_records_outlive_the_server(redis: RedisProcess) -> None:
    with running_server(redis_url=redis.url) as server, open_client(server.address) as client:
        source_id = client.publish(make_identity(), "w1", make_worker())
        client.update_status(source_id, "w1", 0, READY, load=0.5)
    with running_server(redis_url=redis.url) as server, open_client(server.address) as client:
        (ref,) = client.list_sources(make_identity(), status=READY)
        assert ref.source_load == 0.5
        assert client.get_metadata(source_id, "w1").worker.tensors == make_worker().tensors


async def test_a_record_is_decoded_once_until_it_is_replaced(
    redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, decode = [], redis_layout.decode_record
    monkeypatch.setattr(redis_layout, "decode_record", lambda text: decoded.append(text) or decode(text))

    async def get(source_id: str) -> p2p_pb2.WorkerMetadata:
        stored = await store.get(source_id, "w1")
        assert stored is not None
        return p2p_pb2.WorkerMetadata.FromString(stored.worker)

    store = RedisStore(redis.url)
    source_id = await store.publish(make_identity(), "w1", make_worker(status=1))
    assert [(await get(source_id)).status for _ in range(3)] == [1, 1, 1]
    later = make_worker().updated_at + 60_000
    await store.update_status(source_id, "w1", 0, READY, later, None)
    found = await get(source_id)
    assert (found.status, found.updated_at, found.tensors) == (READY, later, make_worker().tensors)
    assert len(decoded) == 1
    worker = make_worker()
    worker.agent_name = "another"
    await store.publish(make_identity(), "w1", worker)
    assert (await get(source_id)).agent_name == "another" and len(decoded) == 2
    await store.close()


def test_two_servers_see_the_same(redis: RedisProcess) -> None:
    with (
        running_server(redis_url=redis.url) as one,
        running_server(redis_url=redis.url) as other,
        open_client(one.address) as first,
        open_client(other.address) as second,
    ):
        source_id = first.publish(make_identity(), "w1", make_worker(status=1))
        assert second.update_status(source_id, "w1", 0, READY)
        assert [ref.worker_id for ref in first.list_sources(make_identity(), status=READY)] == ["w1"]


def test_many_publish_through_two_servers_at_once(redis: RedisProcess) -> None:
    with running_server(redis_url=redis.url) as one, running_server(redis_url=redis.url) as other:
        clients = [open_client(one.address), open_client(other.address)]

        def publish(index: int) -> bool:
            worker = make_worker()
            worker.worker_rank = index % 4
            worker_id = f"w{index // 4}"
            source_id = clients[index % 2].publish(make_identity(), worker_id, worker)
            return clients[(index + 1) % 2].update_status(source_id, worker_id, index % 4, READY)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(publish, range(80)))
        for client in clients:
            refs = client.list_sources(make_identity(), status=READY)
            assert {(ref.worker_id, ref.worker_rank) for ref in refs} == {
                (f"w{index // 4}", index % 4) for index in range(80)
            }
            client.close()


def test_a_listing_shows_what_was_acknowledged_before_it(redis: RedisProcess) -> None:
    """Also while many list at once and share what is read, and whichever server acknowledged it."""
    with (
        running_server(redis_url=redis.url) as one,
        running_server(redis_url=redis.url) as other,
        open_client(one.address) as lister,
        open_client(other.address) as publisher,
        ThreadPoolExecutor(6) as pool,
    ):
        stop = threading.Event()

        def keep_listing() -> None:
            while not stop.is_set():
                lister.list_sources(make_identity())

        listing = [pool.submit(keep_listing) for _ in range(6)]
        try:
            for index in range(20):
                source_id = publisher.publish(make_identity(), f"w{index}", make_worker(status=1))
                assert f"w{index}" in {ref.worker_id for ref in lister.list_sources(make_identity())}
                assert publisher.update_status(source_id, f"w{index}", 0, READY)
                refs = lister.list_sources(make_identity(), status=READY)
                assert {ref.worker_id for ref in refs} == {f"w{number}" for number in range(index + 1)}
        finally:
            stop.set()
        for one_thread in listing:
            one_thread.result(20)


def test_redis_goes_away_and_comes_back(redis: RedisProcess) -> None:
    """What was acknowledged is there afterwards; meanwhile the answers are the reference server's."""
    with running_server(redis_url=redis.url, reaper_scan_interval=0.1) as server, open_client(server.address) as client:
        source_id = client.publish(make_identity(), "w1", make_worker())
        redis.kill()
        assert client.list_sources() == []
        assert client.get_metadata(source_id, "w1") == p2p_pb2.GetMetadataResponse(found=False)
        assert not client.update_status(source_id, "w1", 0, READY)
        with pytest.raises(ModelExpressError, match="REFUSED: Failed to publish metadata: Redis: "):
            client.publish(make_identity(), "w2", make_worker())
        redis.start()
        wait_until(lambda: client.update_status(source_id, "w1", 0, READY), what="an update after the outage")
        assert [ref.worker_id for ref in client.list_sources(make_identity(), status=READY)] == ["w1"]
        assert client.publish(make_identity(), "w2", make_worker()) == source_id


def test_killed_in_the_middle_of_publishing_loses_nothing_acknowledged(redis: RedisProcess) -> None:
    acknowledged: list[str] = []
    with running_server(redis_url=redis.url) as server, open_client(server.address) as client:
        for index in range(200):
            if index == 100:
                redis.kill()
            try:
                client.publish(make_identity(), f"w{index}", make_worker(20))
                acknowledged.append(f"w{index}")
            except ModelExpressError:
                if redis.process is None:
                    redis.start()
        listed = {ref.worker_id for ref in wait_until(client.list_sources, what="a listing")}
        assert len(acknowledged) >= 150
        assert set(acknowledged) <= listed


def test_a_server_starts_while_redis_is_away(redis: RedisProcess) -> None:
    redis.kill()
    with running_server(redis_url=redis.url) as server, open_client(server.address) as client:
        assert client.list_sources() == []
        redis.start()
        wait_until(lambda: publishes(client), what="publishing")


def publishes(client: ModelExpressClient) -> bool:
    try:
        return bool(client.publish(make_identity(), "w1", make_worker()))
    except ModelExpressError:
        return False


def connect(redis: RedisProcess) -> Any:
    return redis_client.Redis(port=redis.port, decode_responses=True)


def test_the_keys_are_the_reference_servers(redis: RedisProcess) -> None:
    with running_server(redis_url=redis.url) as server, open_client(server.address) as client:
        source_id = client.publish(make_identity(), "w1", make_worker())
        client.update_status(source_id, "w1", 0, READY, load=0.5)
        raw = connect(redis)
        assert set(raw.keys()) == {f"mx:source:{source_id}", f"mx:source:{source_id}:w1"}
        source = raw.hgetall(f"mx:source:{source_id}")
        assert set(source) == {"__attributes__", "w1"}
        assert json.loads(source["__attributes__"])["model_name"] == "org/model"
        worker = raw.hgetall(f"mx:source:{source_id}:w1")
        assert set(worker) == {"0", "status:0"}
        assert worker["status:0"] == source["w1"]
        summary = json.loads(source["w1"])
        assert {"worker_rank": 0, "status": READY, "accelerator": "cpu", "source_load": 0.5}.items() <= summary.items()
        assert isinstance(summary["updated_at"], int) and isinstance(summary["topology"], dict)
        assert raw.ttl(f"mx:source:{source_id}") == -1


def test_records_of_the_first_reference_servers_are_read(redis: RedisProcess) -> None:
    """Their index holds just the rank, or nothing, and the status is in the record only."""
    raw = connect(redis)
    raw.hset("mx:source:0123456789abcdef", mapping={"__attributes__": '{"model_name":"m"}', "w1": "3", "w2": ""})
    for worker_id, rank in (("w1", 3), ("w2", 0)):
        record = {"worker_rank": rank, "tensors": [], "status": READY, "updated_at": 1_700_000_000_000}
        raw.hset(f"mx:source:0123456789abcdef:{worker_id}", str(rank), json.dumps(record))
    with running_server(redis_url=redis.url, heartbeat_timeout=1e9) as server, open_client(server.address) as client:
        refs = client.list_sources(status=READY)
        assert {(ref.worker_id, ref.worker_rank, ref.model_name) for ref in refs} == {("w1", 3, "m"), ("w2", 0, "m")}
        assert client.update_status("0123456789abcdef", "w2", 0, 1)
        assert client.get_metadata("0123456789abcdef", "w2").worker.status == 1
        assert json.loads(raw.hget("mx:source:0123456789abcdef", "w2"))["status"] == 1


def test_what_cannot_be_read_does_not_hide_the_rest(redis: RedisProcess) -> None:
    with running_server(redis_url=redis.url) as server, open_client(server.address) as client:
        source_id = client.publish(make_identity(), "good", make_worker())
        raw = connect(redis)
        raw.hset(f"mx:source:{source_id}", "bad", '{"worker_rank":"x"}')
        raw.hset(f"mx:source:{source_id}:bad", "0", "{")
        raw.hset(f"mx:source:{source_id}", b"\xff", b'{"worker_rank":0,"status":2,"updated_at":1}')
        raw.hset(f"mx:source:{source_id}:".encode() + b"\xff", "0", "{}")
        raw.hset(f"mx:source:{source_id}", "old", "0")
        raw.hset(f"mx:source:{source_id}:old", "0", "not a record")
        raw.hset("mx:source:0000000000000000", "__attributes__", "not json")
        assert [ref.worker_id for ref in client.list_sources()] == ["good"]
        assert not client.get_metadata(source_id, "bad").found


def test_a_reserved_worker_id_is_refused(redis: RedisProcess) -> None:
    with (
        running_server(redis_url=redis.url) as server,
        open_client(server.address) as client,
        pytest.raises(ModelExpressError, match="the worker id __attributes__ is reserved"),
    ):
        client.publish(make_identity(), "__attributes__", make_worker())


def test_a_bad_url_is_one_line() -> None:
    command = [
        sys.executable,
        "-m",
        "ramet.modelexpress_server",
        "--port",
        "0",
        "--metrics-port",
        "0",
        "--redis-url",
        "x://y",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "--redis-url" in result.stderr and len(result.stderr.splitlines()) == 1
