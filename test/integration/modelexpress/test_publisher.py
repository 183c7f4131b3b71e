"""A publisher keeps its record as it should be, whatever happens to the server, and harms nobody."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from modelexpress_harness import (
    free_port,
    make_identity,
    make_worker,
    open_client,
    running_redis,
    running_server,
    wait_until,
)
from ramet.srt.modelexpress.client.client import ModelExpressClient
from ramet.srt.modelexpress.client.publisher import INITIALIZING, READY, STALE, Publisher
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import read_facts
from ramet.srt.modelexpress.server.server import ModelExpressServer
from ramet.srt.weights.report import PublisherStats, StandsStill


@pytest.fixture
def server() -> Iterator[ModelExpressServer]:
    with running_server(reaper_scan_interval=0.1) as running:
        yield running


def make_publisher(address: str, **options: Any) -> Publisher:
    return Publisher(open_client(address), make_identity(), make_worker(), **{"heartbeat_interval_s": 0.1} | options)


def listed(client: ModelExpressClient, status: int) -> list[str]:
    return [ref.worker_id for ref in client.list_sources(make_identity(), status=status)]


def test_the_life_of_a_record(client: ModelExpressClient) -> None:
    """Defect 12: READY only when told so; not READY while its weights change."""
    publisher = make_publisher(client.address, load_probe=lambda: 0.25)
    publisher.start()
    wait_until(lambda: listed(client, INITIALIZING), what="INITIALIZING")
    assert listed(client, READY) == []
    assert publisher.set_status(READY, timeout_s=10)
    (ref,) = client.list_sources(make_identity(), status=READY)
    assert ref.worker_id == publisher.worker_id and ref.source_load == 0.25
    assert publisher.set_status(STALE, timeout_s=10)
    assert listed(client, READY) == [] and listed(client, STALE) == [publisher.worker_id]
    assert publisher.set_status(READY, timeout_s=10)
    assert listed(client, READY) == [publisher.worker_id]
    publisher.close()
    assert listed(client, STALE) == [publisher.worker_id]


def test_a_standing_instance_is_not_called_ready(client: ModelExpressClient) -> None:
    """Its record gets old, and goes on when it moves again; its withdrawal does not wait."""
    stands = False

    def probe() -> float:
        if stands:
            raise StandsStill
        return 0.5

    publisher = make_publisher(client.address, load_probe=probe)
    publisher.start()
    assert publisher.set_status(READY, timeout_s=10)
    stands = True
    before = wait_until(lambda: publisher.stats().num_heartbeats, what="a heartbeat")
    time.sleep(0.5)  # five beats
    assert publisher.stats().num_heartbeats <= before + 1
    stands = False
    wait_until(lambda: publisher.stats().num_heartbeats > before + 3, what="heartbeats")
    stands = True
    publisher.close()
    assert listed(client, STALE) == [publisher.worker_id]


def test_another_record_takes_the_place_of_one(client: ModelExpressClient) -> None:
    """In the same state, and as the same worker."""
    publisher = make_publisher(client.address, heartbeat_interval_s=30.0)
    publisher.start()
    assert publisher.set_status(READY, timeout_s=10)

    def shown() -> list[str]:
        refs = client.list_sources(make_identity(), status=READY)
        assert [ref.worker_id for ref in refs] in ([publisher.worker_id], [])
        return [facts.weight_version for ref in refs if (facts := read_facts(ref.topology)) is not None]

    assert shown() == ["default"]
    for version in ("v1", "v2"):
        publisher.publish_anew(make_worker(weight_version=version))
        wait_until(lambda version=version: shown() == [version], what="the new record")
    assert publisher.set_status(STALE, timeout_s=10)
    publisher.publish_anew(make_worker(weight_version="v3"))  # of weights that nobody shall take
    publisher.close()
    assert listed(client, READY) == [] and listed(client, STALE) == [publisher.worker_id]


def test_heartbeats_keep_it_listed() -> None:
    with running_server(reaper_scan_interval=0.1, heartbeat_timeout=1.0) as server:
        client = open_client(server.address)
        publisher = make_publisher(server.address, heartbeat_interval_s=0.2)
        publisher.start()
        assert publisher.set_status(READY, timeout_s=10)
        start = publisher.stats().num_heartbeats
        wait_until(lambda: publisher.stats().num_heartbeats >= start + 8, what="heartbeats")
        assert listed(client, READY) == [publisher.worker_id]
        publisher.close()
        client.close()


def test_a_worker_that_dies_without_a_word_is_not_listed_for_long() -> None:
    """Defect 11."""
    with running_server(reaper_scan_interval=0.1, heartbeat_timeout=0.5) as server:
        client = open_client(server.address)
        client.publish(make_identity(), "dead", make_worker())
        wait_until(lambda: listed(client, STALE) == ["dead"], what="STALE")
        assert listed(client, READY) == []
        client.close()


def test_a_server_that_is_down_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    publisher = make_publisher(f"127.0.0.1:{port}")
    publisher.start()
    assert not publisher.set_status(READY)
    wait_until(lambda: publisher.stats().num_failures >= 2, what="failures that are counted")
    assert f"at ModelExpress server 127.0.0.1:{port} failed: UNAVAILABLE" in publisher.stats().last_error
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1  # said once, not at each attempt
    with running_server(port=port) as server, open_client(server.address) as client:
        wait_until(lambda: listed(client, READY) == [publisher.worker_id], 30, "READY at the server that came late")
        wait_until(lambda: publisher.stats().status == "READY", what="the server's answer")
        assert publisher.stats().last_error == ""
        publisher.close()


def test_a_server_that_loses_everything(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with running_server(port=port) as server:
        publisher = make_publisher(server.address)
        publisher.start()
        assert publisher.set_status(READY, timeout_s=10)
    wait_until(lambda: publisher.stats().num_failures >= 1, what="a failure")
    with running_server(port=port) as server, open_client(server.address) as client:
        wait_until(lambda: listed(client, READY) == [publisher.worker_id], 30, "the record at the new server")
        wait_until(lambda: publisher.stats().num_publishes == 2, what="the server's answer")
        assert publisher.stats().num_lost == 1
        publisher.close()
        assert listed(client, READY) == []


def test_a_server_that_restarts_between_two_heartbeats() -> None:
    """It comes back without its records: they must be there again long before the next heartbeat."""
    port = free_port()
    with running_server(port=port) as server:
        publisher = make_publisher(server.address, heartbeat_interval_s=600.0)
        publisher.start()
        assert publisher.set_status(READY, timeout_s=10)
    with running_server(port=port) as server, open_client(server.address) as client:
        wait_until(lambda: listed(client, READY) == [publisher.worker_id], 15, "the record at the new server")
        publisher.close()


def test_a_record_that_somebody_else_marked_stale_is_ready_again(
    server: ModelExpressServer, client: ModelExpressClient
) -> None:
    publisher = make_publisher(server.address)
    publisher.start()
    assert publisher.set_status(READY, timeout_s=10)
    (ref,) = client.list_sources(make_identity(), status=READY)
    client.update_status(ref.mx_source_id, ref.worker_id, 0, STALE)
    wait_until(lambda: listed(client, READY) == [publisher.worker_id], what="READY")
    publisher.close()


def test_close_does_not_wait_for_a_server_that_hangs(server: ModelExpressServer) -> None:
    """Stopped, not dead: its port takes connections and nobody answers."""
    code = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    silent = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    assert silent.stdout is not None
    publisher = make_publisher(f"127.0.0.1:{silent.stdout.readline().strip()}")
    publisher.start()
    start = time.monotonic()
    publisher.close(timeout_s=0.5)
    assert time.monotonic() - start < 5
    silent.send_signal(signal.SIGKILL)
    silent.wait(10)
    silent.stdout.close()


def test_close_before_start_and_twice() -> None:
    """Closed before its start it says nothing to the server, and a second close is no error."""
    with running_server() as server, open_client(server.address) as client:
        unstarted = make_publisher(server.address)
        unstarted.close()
        unstarted.close()
        assert unstarted.stats() == PublisherStats(status="") and client.list_sources() == []
        publisher = make_publisher(server.address)
        publisher.start()
        assert publisher.set_status(READY, timeout_s=10)
        for _ in range(2):
            publisher.close()
            assert not publisher._thread.is_alive()
            assert listed(client, STALE) == [publisher.worker_id]


def test_a_record_withdrawn_before_it_was_published_never_shows(
    server: ModelExpressServer, client: ModelExpressClient
) -> None:
    publisher = make_publisher(server.address)
    publisher.set_status(STALE)
    publisher.start()
    assert not publisher.set_status(STALE, timeout_s=0.5)  # nobody was told, so nobody acknowledges
    assert publisher.stats().num_publishes == 0 and client.list_sources() == []
    assert publisher.set_status(READY, timeout_s=10)  # it was there all the while
    assert listed(client, READY) == [publisher.worker_id]
    publisher.close()


def test_the_server_killed_at_every_step() -> None:
    """Before publishing, between publishing and READY, while READY: each time all is well once it is back."""
    port = free_port()
    publisher = make_publisher(f"127.0.0.1:{port}")
    publisher.start()
    wait_until(lambda: publisher.stats().num_failures, what="a failure")
    with running_server(port=port):
        wait_until(lambda: publisher.stats().status == "INITIALIZING", 30, "INITIALIZING")
        assert publisher.stats().last_error == ""
    publisher.set_status(READY)
    for num_publishes in (2, 3):
        wait_until(lambda: publisher.stats().last_error, what="a failure")
        with running_server(port=port) as server, open_client(server.address) as client:
            wait_until(lambda: publisher.stats().last_error == "", 30, "the server's answer")
            assert listed(client, READY) == [publisher.worker_id]
            assert publisher.stats().num_publishes == num_publishes
    publisher.close()
    assert publisher.stats().num_lost == 2


def test_withdrawing_a_record_that_the_server_has_lost() -> None:
    port = free_port()
    with running_server(port=port) as server:
        publisher = make_publisher(server.address, heartbeat_interval_s=60)
        publisher.start()
        assert publisher.set_status(READY, timeout_s=10)
    with running_server(port=port):
        assert publisher.set_status(STALE, timeout_s=30)
        publisher.close()


def test_withdrawing_goes_on_until_the_store_is_back(tmp_path: Path) -> None:
    """Defect 12: while Redis is away a withdrawal is refused; the record must not stay READY afterwards."""
    with running_redis(tmp_path) as redis, running_server(redis_url=redis.url) as server:
        publisher = make_publisher(server.address)
        publisher.start()
        assert publisher.set_status(READY, timeout_s=10)
        redis.kill()
        assert not publisher.set_status(STALE, timeout_s=1.5)
        redis.start()
        assert publisher.set_status(STALE, timeout_s=30)
        with open_client(server.address) as client:
            assert listed(client, READY) == [] and listed(client, STALE) == [publisher.worker_id]
        publisher.close()


def test_unset_load_is_unknown(server: ModelExpressServer, client: ModelExpressClient) -> None:
    publisher = make_publisher(server.address)
    publisher.start()
    assert publisher.set_status(READY, timeout_s=10)
    assert not client.list_sources()[0].HasField("source_load")
    assert p2p_pb2.SourceStatus.Name(client.get_metadata(*ids(client)).worker.status) == "SOURCE_STATUS_READY"
    publisher.close()


def ids(client: ModelExpressClient) -> tuple[str, str]:
    (ref,) = client.list_sources()
    return ref.mx_source_id, ref.worker_id
