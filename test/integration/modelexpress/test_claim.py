"""Of instances that start together one reads the files; a crash releases its claim; the rest take from it."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from modelexpress_harness import make_identity, make_worker, open_client, running_server, wait_until
from ramet.srt.modelexpress.ages import AgeTracker
from ramet.srt.modelexpress.client.claim import FileClaim
from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.client.discovery import (
    fetch_source,
    find_other_topologies,
    find_sources,
    look_and_claim,
    order_sources,
    search,
)
from ramet.srt.modelexpress.client.publisher import INITIALIZING, READY, STALE, Publisher
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import FACTS_KEY, InstanceFacts, encode_facts
from ramet.srt.modelexpress.server.server import ModelExpressServer

IDENTITY = make_identity()


def make_claim(address: str, name: str = "instance", **options: Any) -> FileClaim:
    options = {"renewal_s": 0.1, "silence_s": 1.0} | options
    return FileClaim(lambda: open_client(address), IDENTITY, InstanceFacts(instance=name), **options)


def test_one_holds_it_until_it_lets_go(client: ModelExpressClient) -> None:
    first, second = make_claim(client.address), make_claim(client.address)
    assert first.try_acquire(client) and first.try_acquire(client)
    assert not second.try_acquire(client)
    first.release()
    assert second.try_acquire(client)
    second.release()


def test_a_claim_is_no_source(client: ModelExpressClient) -> None:
    claim = make_claim(client.address)
    assert claim.try_acquire(client)
    assert client.list_sources(IDENTITY) == []
    assert client.list_sources(status=READY) == []
    claim.release()


def test_a_crash_releases_it(client: ModelExpressClient) -> None:
    """Its heartbeats end, and its record stays INITIALIZING for the server's 90 s; claimants need not wait for that."""
    crashed = make_claim(client.address)
    assert crashed.try_acquire(client)
    publisher = crashed._publisher
    assert publisher is not None
    publisher._client.close()  # from here on nobody hears of it
    other = make_claim(client.address)
    start = time.monotonic()
    wait_until(lambda: other.try_acquire(client), 10, "the other's claim")
    assert 0.5 < time.monotonic() - start < 5
    other.release()


def test_a_server_that_dies_of_a_claim_is_an_error(server: ModelExpressServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else its outage would seem to begin when the claim has been waited for."""
    original = ModelExpressClient.publish

    def publish(self: ModelExpressClient, *args: Any) -> str:
        server.close(grace_s=0)
        return original(self, *args)

    monkeypatch.setattr(ModelExpressClient, "publish", publish)
    claim = make_claim(server.address, ack_timeout_s=0.5)
    with open_client(server.address) as client, pytest.raises(ModelExpressError, match="UNAVAILABLE"):
        look_and_claim(client, IDENTITY, 0, claim, (), AgeTracker(wall_ms=None))
    assert not claim.held


def test_never_two_at_once(client: ModelExpressClient) -> None:
    """Twelve contend for it again and again; each holds it for a moment."""
    inside, most, turns = 0, 0, 0
    lock = threading.Lock()

    def contend(index: int) -> None:
        nonlocal inside, most, turns
        claim = make_claim(client.address, silence_s=30.0)
        for _ in range(3):
            wait_until(lambda: claim.try_acquire(client), 60, "a turn")
            with lock:
                inside += 1
                turns += 1
                most = max(most, inside)
            time.sleep(0.005)
            with lock:
                inside -= 1
            claim.release()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(contend, range(12)))
    assert (most, turns) == (1, 36)


def start_replica(address: str, name: str, events: list[str], load: Callable[[], None]) -> Publisher:
    """What an instance does: search, read the files or take from a source, publish, be READY, let go of the claim."""
    claim = make_claim(address, name, silence_s=10.0)
    with open_client(address) as client:
        found = search(client, IDENTITY, 0, claim=claim, timeout_s=60, poll_s=0.05)
    if found.holds_claim:
        load()
        events.append("files")
    else:
        assert found.sources, found.reason
        events.append("source")
    publisher = Publisher(open_client(address), IDENTITY, make_worker(), heartbeat_interval_s=0.2)
    publisher.start()
    assert publisher.set_status(READY, timeout_s=10)
    claim.release()
    return publisher


def test_ten_replicas_at_once_read_the_files_once(server: ModelExpressServer) -> None:
    events: list[str] = []
    with ThreadPoolExecutor(10) as pool:
        publishers = list(
            pool.map(
                lambda index: start_replica(server.address, f"i{index}", events, lambda: time.sleep(0.5)), range(10)
            )
        )
    assert sorted(events) == ["files"] + ["source"] * 9
    for publisher in publishers:
        publisher.close()


def test_the_one_that_reads_crashes_and_another_takes_over(client: ModelExpressClient) -> None:
    crashed = make_claim(client.address)
    assert crashed.try_acquire(client)
    publisher = crashed._publisher
    assert publisher is not None
    publisher._client.close()
    found = search(client, IDENTITY, 0, claim=make_claim(client.address), timeout_s=20, poll_s=0.05)
    assert found.holds_claim


def test_it_waits_for_a_source_that_is_coming(client: ModelExpressClient) -> None:
    source_id = client.publish(IDENTITY, "seed", make_worker(status=INITIALIZING))
    timer = threading.Timer(0.5, lambda: client.update_status(source_id, "seed", 0, READY))
    timer.start()
    found = search(client, IDENTITY, 0, claim=make_claim(client.address), timeout_s=20, poll_s=0.05)
    assert [ref.worker_id for ref in found.sources] == ["seed"] and not found.holds_claim
    timer.join()


def test_it_gives_up_waiting_at_its_deadline(client: ModelExpressClient) -> None:
    client.publish(IDENTITY, "seed", make_worker(status=INITIALIZING))
    start = time.monotonic()
    found = search(client, IDENTITY, 0, claim=None, timeout_s=0.5, poll_s=0.05)
    assert time.monotonic() - start < 5
    assert not found.sources and not found.holds_claim and "a source that is initializing" in found.reason


def test_a_failed_source_does_not_come_back(client: ModelExpressClient) -> None:
    """Defects 10 and 11: a seed that was killed is still listed READY; the search goes on past it at once."""
    client.publish(IDENTITY, "dead", make_worker())
    claim = make_claim(client.address)
    assert [ref.worker_id for ref in search(client, IDENTITY, 0, claim=claim, timeout_s=5).sources] == ["dead"]
    start = time.monotonic()
    found = search(client, IDENTITY, 0, claim=claim, timeout_s=5, failed={"dead"})
    assert found.holds_claim and time.monotonic() - start < 2
    claim.release()


def test_a_server_that_cannot_be_reached_is_an_error_with_its_address() -> None:
    with open_client("127.0.0.1:1") as client:
        with pytest.raises(ModelExpressError) as caught:
            search(client, IDENTITY, 0, claim=None, timeout_s=0.5, poll_s=0.05)
        assert (caught.value.code, caught.value.address, caught.value.method) == (
            "UNAVAILABLE",
            "127.0.0.1:1",
            "ListSources",
        )
        assert "refused" in caught.value.details.lower()


def test_a_server_that_is_killed_while_somebody_waits() -> None:
    with running_server() as server:
        client = open_client(server.address)
        client.publish(IDENTITY, "seed", make_worker(status=INITIALIZING))
        threading.Timer(0.3, server.close, [0.1]).start()
        with pytest.raises(ModelExpressError, match="UNAVAILABLE"):
            search(client, IDENTITY, 0, claim=None, timeout_s=2.0, poll_s=0.05)
        client.close()


def test_the_least_busy_comes_first() -> None:
    loads = {"busy": 0.9, "idle": 0.0, "silent": None, "middling": 0.3, "odd": 7.0}
    refs = [p2p_pb2.SourceInstanceRef(worker_id=name, source_load=load) for name, load in loads.items()]
    ordered = [ref.worker_id for ref in order_sources(refs)]
    assert ordered[:3] == ["idle", "middling", "silent"] and set(ordered[3:]) == {"busy", "odd"}


def test_those_of_the_own_host_come_before() -> None:
    hosts = {"here": socket.gethostname(), "there": "another-host"}
    refs = []
    for name, host in hosts.items():
        ref = p2p_pb2.SourceInstanceRef(worker_id=name, source_load=0.9 if name == "here" else 0.0)
        ref.topology[FACTS_KEY] = encode_facts(InstanceFacts(instance=f"http://{name}:1", host=host))
        refs.append(ref)
    assert [ref.worker_id for ref in order_sources(refs[::-1])] == ["here", "there"]


def test_equals_come_in_any_order() -> None:
    refs = [p2p_pb2.SourceInstanceRef(worker_id=str(index)) for index in range(5)]
    assert len({order_sources(refs)[0].worker_id for _ in range(200)}) == 5


def test_only_the_own_shard_rank_is_found(client: ModelExpressClient) -> None:
    for rank in (0, 1):
        worker = make_worker()
        worker.worker_rank = rank
        client.publish(IDENTITY, f"w{rank}", worker)
    assert [ref.worker_id for ref in find_sources(client, IDENTITY, 1)] == ["w1"]


def test_a_source_is_fetched_unless_it_has_gone(client: ModelExpressClient) -> None:
    source_id = client.publish(IDENTITY, "w", make_worker())
    (ref,) = find_sources(client, IDENTITY, 0)
    source = fetch_source(client, ref)
    assert source is not None and len(source.tensors) == 3 and source.info_url.startswith("http://")
    client.update_status(source_id, "w", 0, STALE)
    assert fetch_source(client, ref) is None
    ref.worker_id = "other"
    assert fetch_source(client, ref) is None


def test_other_topologies_of_the_same_model(client: ModelExpressClient) -> None:
    wanted = make_identity(revision="r1", tp_size=1)
    for worker_id, identity in {
        "own": wanted,
        "tp2": make_identity(revision="r1", tp_size=2),
        "pp2": make_identity(revision="r1", pp_size=2),
        "other revision": make_identity(revision="r2", tp_size=2),
        "draft": make_identity(revision="r1", tp_size=2, role="draft"),
        "other type": make_identity(revision="r1", tp_size=2, dtype="float16"),
    }.items():
        client.publish(identity, worker_id, make_worker())
    found = find_other_topologies(client, wanted)
    assert {ref.worker_id for topology in found for ref in topology.sources} == {"tp2", "pp2"}
    assert {topology.identity.tensor_parallel_size for topology in found} == {1, 2}
