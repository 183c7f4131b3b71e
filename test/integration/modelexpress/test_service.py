"""Every behaviour of the reference server, over gRPC, with records in memory and in Redis."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from modelexpress_harness import make_identity, make_worker, running_redis, running_server
from ramet.srt.modelexpress.ages import wall_clock_ms
from ramet.srt.modelexpress.client.client import SERVICE, ModelExpressClient
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.rpc import MESSAGE_SIZE_OPTIONS, client_calls
from ramet.srt.modelexpress.server.server import ModelExpressServer

INITIALIZING = p2p_pb2.SOURCE_STATUS_INITIALIZING
READY = p2p_pb2.SOURCE_STATUS_READY
STALE = p2p_pb2.SOURCE_STATUS_STALE


@pytest.fixture(params=["memory", "redis"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModelExpressServer]:
    if request.param == "memory":
        with running_server(reaper_scan_interval=3600) as running:
            yield running
    else:
        with (
            running_redis(tmp_path) as redis,
            running_server(redis_url=redis.url, reaper_scan_interval=3600) as running,
        ):
            yield running


@pytest.fixture
def call(server: ModelExpressServer) -> Iterator[Any]:
    """Makes a call with a request as it is."""
    with grpc.insecure_channel(server.address, options=MESSAGE_SIZE_OPTIONS) as channel:
        calls = client_calls(channel, SERVICE)
        yield lambda method, request: calls[method](request, timeout=20)


def publish_request(**parts: Any) -> p2p_pb2.PublishMetadataRequest:
    return p2p_pb2.PublishMetadataRequest(
        **{"identity": make_identity(), "worker": make_worker(), "worker_id": "w1"} | parts
    )


def test_publish_checks_in_order(call: Any) -> None:
    requests = [
        (p2p_pb2.PublishMetadataRequest(), "identity is required"),
        (publish_request(identity=p2p_pb2.SourceIdentity(), worker_id=""), "identity.model_name is required"),
        (publish_request(worker_id="", worker=None), "worker_id is required"),
        (publish_request(worker=None), "worker is required"),
    ]
    for request, message in requests:
        answer = call("PublishMetadata", request)
        assert answer == p2p_pb2.PublishMetadataResponse(success=False, message=message)


def test_publish_answers_the_ids_and_stores_as_sent(call: Any) -> None:
    worker = make_worker(status=INITIALIZING)
    worker.updated_at = 12345
    answer = call("PublishMetadata", publish_request(worker=worker))
    assert answer.success and answer.worker_id == "w1" and len(answer.mx_source_id) == 16
    found = call("GetMetadata", p2p_pb2.GetMetadataRequest(mx_source_id=answer.mx_source_id, worker_id="w1"))
    assert found.found and found.worker == worker and found.identity == make_identity()
    assert (found.mx_source_id, found.worker_id) == (answer.mx_source_id, "w1")


@pytest.mark.parametrize("old", [True, False])
def test_either_way_of_writing_tensors_is_answered_in_both(call: Any, old: bool) -> None:
    worker = make_worker(5)
    tensors = list(worker.tensors)
    worker.ClearField("tensor_source" if old else "tensors")
    answer = call("PublishMetadata", publish_request(worker=worker))
    found = call("GetMetadata", p2p_pb2.GetMetadataRequest(mx_source_id=answer.mx_source_id, worker_id="w1")).worker
    assert list(found.tensors) == list(found.tensor_source.tensors) == tensors


def test_the_payload_wins(call: Any) -> None:
    worker = make_worker(2)
    del worker.tensors[:]
    worker.tensors.add(name="other")
    answer = call("PublishMetadata", publish_request(worker=worker))
    found = call("GetMetadata", p2p_pb2.GetMetadataRequest(mx_source_id=answer.mx_source_id, worker_id="w1")).worker
    assert len(found.tensors) == len(found.tensor_source.tensors) == 2


def test_an_artifact_is_kept_and_has_no_tensors(call: Any) -> None:
    worker = p2p_pb2.WorkerMetadata(artifact_source=p2p_pb2.ArtifactSourceMetadata(artifact_id="a", total_size=2**60))
    answer = call("PublishMetadata", publish_request(worker=worker))
    found = call("GetMetadata", p2p_pb2.GetMetadataRequest(mx_source_id=answer.mx_source_id, worker_id="w1")).worker
    assert found == worker


def test_fields_of_later_versions_pass_through(call: Any) -> None:
    worker = p2p_pb2.WorkerMetadata.FromString(make_worker().SerializeToString() + b"\xc2\x3e\x03new")
    identity = p2p_pb2.SourceIdentity.FromString(make_identity().SerializeToString() + b"\xc2\x3e\x03new")
    answer = call("PublishMetadata", publish_request(worker=worker, identity=identity))
    found = call("GetMetadata", p2p_pb2.GetMetadataRequest(mx_source_id=answer.mx_source_id, worker_id="w1"))
    assert b"\xc2\x3e\x03new" in found.worker.SerializeToString()
    assert b"\xc2\x3e\x03new" in found.identity.SerializeToString()


def test_publish_replaces_a_rank_and_leaves_the_others(client: ModelExpressClient) -> None:
    first, second = make_worker(3), make_worker(2)
    first.worker_rank, second.worker_rank = 1, 0
    client.publish(make_identity(), "w1", first)
    source_id = client.publish(make_identity(), "w1", second)
    assert {ref.worker_rank for ref in client.list_sources(make_identity())} == {0, 1}
    assert client.get_metadata(source_id, "w1").worker.worker_rank == 0
    client.update_status(source_id, "w1", 1, STALE)
    assert [ref.worker_rank for ref in client.list_sources(make_identity(), status=READY)] == [0]
    smaller = make_worker(1)
    smaller.ClearField("topology")
    client.publish(make_identity(), "w1", smaller)
    found = client.get_metadata(source_id, "w1").worker
    assert len(found.tensors) == 1 and not found.topology


def test_listing_filters(client: ModelExpressClient, call: Any) -> None:
    for model, worker_id, rank, age_s in [("A", "a0", 0, 65), ("A", "a1", 1, 15), ("b", "b0", 0, 25)]:
        worker = make_worker(age_s=age_s)
        worker.worker_rank = rank
        client.publish(make_identity(model), worker_id, worker)

    def listed(**request: Any) -> list[str]:
        answer = call("ListSources", p2p_pb2.ListSourcesRequest(**request))
        return [ref.worker_id for ref in answer.instances]

    assert listed() == ["a1", "b0", "a0"]  # newest first
    assert listed(identity=p2p_pb2.SourceIdentity(dtype="float64")) == ["a1", "b0", "a0"]
    assert listed(identity=make_identity("A")) == ["a1", "a0"]
    assert listed(identity=make_identity("a")) == ["a1", "a0"]  # the id is that of the lowercased name
    assert listed(identity=make_identity("c")) == []
    assert listed(model_name_filter="A") == ["a1", "a0"]
    assert listed(model_name_filter="a") == []
    assert listed(worker_rank_filter=0) == ["b0", "a0"]
    assert listed(limit=2) == ["a1", "b0"]
    assert listed(limit=0) == ["a1", "b0", "a0"]
    assert listed(status_filter=READY) == ["a1", "b0", "a0"]
    assert listed(status_filter=STALE) == []
    assert listed(status_filter=77) == ["a1", "b0", "a0"]
    assert listed(min_updated_at=wall_clock_ms() - 50_000) == ["a1", "b0"]
    assert listed(min_training_step=0) == []


def test_listing_shows_what_the_identity_and_the_record_say(client: ModelExpressClient, call: Any) -> None:
    for step_key, worker_id in (("training_step", "w7"), ("version", "w8")):
        identity = make_identity()
        identity.extra_parameters.update({step_key: worker_id[1:], "layout_signature": "d1"})
        client.publish(identity, worker_id, make_worker())
    refs = call("ListSources", p2p_pb2.ListSourcesRequest(min_training_step=8)).instances
    assert [ref.worker_id for ref in refs] == ["w8"]
    assert (refs[0].training_step, refs[0].layout_signature, refs[0].accelerator) == (8, "d1", "cpu")
    assert refs[0].model_name == "org/model" and "ramet" in refs[0].topology
    assert not refs[0].HasField("source_load")


def test_ready_means_heard_of_lately(server: ModelExpressServer, client: ModelExpressClient) -> None:
    for worker_id, updated_at in [("new", wall_clock_ms()), ("never", 0), ("old", wall_clock_ms() - 91_000)]:
        worker = make_worker(status=READY)
        worker.updated_at = updated_at
        client.publish(make_identity(), worker_id, worker)
    assert [ref.worker_id for ref in client.list_sources(make_identity(), status=READY)] == ["new"]
    assert {ref.worker_id for ref in client.list_sources(make_identity())} == {"new", "never", "old"}


def test_get_metadata_that_is_not_there(call: Any) -> None:
    def get(source_id: str, worker_id: str) -> p2p_pb2.GetMetadataResponse:
        return call("GetMetadata", p2p_pb2.GetMetadataRequest(mx_source_id=source_id, worker_id=worker_id))

    assert get("", "w") == get("s", "") == p2p_pb2.GetMetadataResponse(found=False)
    assert get("s", "w") == p2p_pb2.GetMetadataResponse(found=False, mx_source_id="s", worker_id="w")


def test_update_status_checks(call: Any) -> None:
    def update(**request: Any) -> str:
        answer = call("UpdateStatus", p2p_pb2.UpdateStatusRequest(**request))
        assert not answer.success
        return answer.message

    assert update() == "mx_source_id is required"
    assert update(mx_source_id="s") == "worker_id is required"
    assert update(mx_source_id="s", worker_id="w", status=9) == "invalid status value: 9"
    assert "no rank 0 of worker w" in update(mx_source_id="s", worker_id="w", status=READY)
    assert not call("GetMetadata", p2p_pb2.GetMetadataRequest(mx_source_id="s", worker_id="w")).found


def test_update_status_stamps_and_revives(client: ModelExpressClient) -> None:
    source_id = client.publish(make_identity(), "w1", make_worker(status=STALE, age_s=60))
    assert not client.update_status(source_id, "w1", 5, READY)
    before = wall_clock_ms()
    assert client.update_status(source_id, "w1", 0, READY, load=0.25)
    (ref,) = client.list_sources(make_identity(), status=READY)
    assert ref.updated_at >= before and ref.source_load == 0.25 and "ramet" in ref.topology and ref.accelerator == "cpu"
    assert client.get_metadata(source_id, "w1").worker.status == READY
    for no_load in (None, float("nan"), float("inf")):
        assert client.update_status(source_id, "w1", 0, READY, load=no_load)
        assert not client.list_sources(make_identity())[0].HasField("source_load")


@pytest.mark.slow
def test_a_large_record(client: ModelExpressClient, call: Any) -> None:
    """50 MB of tensors, in one field: the answer has them in both and just fits a message."""
    client.timeout_s = 120.0
    worker = p2p_pb2.WorkerMetadata(status=READY, updated_at=wall_clock_ms())
    name = "x" * 5_000
    worker.tensors.extend([p2p_pb2.TensorDescriptor(name=name, addr=2**60, size=1)] * 10_000)
    assert worker.ByteSize() > 50_000_000
    source_id = client.publish(make_identity(), "w1", worker)
    found = client.get_metadata(source_id, "w1").worker
    assert len(found.tensors) == len(found.tensor_source.tensors) == 10_000
    worker.tensors.extend([p2p_pb2.TensorDescriptor(name=name, addr=2**60, size=1)] * 5_000)
    client.publish(make_identity(), "w1", worker)
    found = client.get_metadata(source_id, "w1").worker  # twice 75 MB would not fit
    assert len(found.tensors) == 0 and len(found.tensor_source.tensors) == 15_000
    assert len(client.list_sources(make_identity(), status=READY)) == 1
