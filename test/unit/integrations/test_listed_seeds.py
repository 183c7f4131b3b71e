"""Owns the tests of finding seeds for vLLM at a metadata server: which records count, and how long one is awaited."""

import time

import modelexpress_harness as mx
import pytest
from modelexpress_harness import client, server  # noqa: F401  fixtures
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.errors import WeightTransferError
from ramet_vllm.listed_seeds import find_listed


def find(server, **options):  # noqa: F811
    wanted = {"model_name": "org/model", "dtype": "bfloat16", "revision": "", "timeout_s": 0.1, "rank": 3}
    return find_listed(server.address, **wanted | options)


def test_instances_of_any_size_are_found_once(server, client):  # noqa: F811
    """Not those of another dtype or quantisation, those that are starting, trainers, or other people's engines."""
    identity = mx.make_identity()
    client.publish(identity, "whole", mx.make_worker(instance="http://10.0.0.1:1"))
    for rank in (0, 1):
        half = mx.make_identity(tp_size=2)
        client.publish(half, f"half-{rank}", mx.make_worker(instance="https://[::1]:2", world_rank=rank))
    starting = mx.make_worker(status=p2p_pb2.SOURCE_STATUS_INITIALIZING, instance="http://10.0.0.3:3")
    client.publish(identity, "starting", starting)
    client.publish(mx.make_identity(dtype="float16"), "other", mx.make_worker(instance="http://10.0.0.4:4"))
    client.publish(mx.make_identity(quantization="fp8"), "fp8", mx.make_worker(instance="http://10.0.0.5:5"))
    client.publish(identity, "trainer", mx.make_worker(instance="http://10.0.0.6:6", trainer_run="run"))
    client.publish(identity, "stranger", mx.make_worker(instance="a name"))
    assert set(find(server)) == {SeedAddress("10.0.0.1", 1), SeedAddress("::1", 2, "https")}
    assert len(find(server)) == 2


def test_one_that_comes_is_waited_for(server, client):  # noqa: F811
    with pytest.raises(WeightTransferError, match="rank 3 .*it lists no ready instance of 'org/model' in bfloat16"):
        find(server)
    client.publish(mx.make_identity(revision="abc"), "one", mx.make_worker(instance="http://10.0.0.1:1"))
    with pytest.raises(WeightTransferError, match="of the revision def"):
        find(server, revision="def")
    assert find(server, revision="abc") == [SeedAddress("10.0.0.1", 1)]


def test_a_server_that_is_not_there_is_named():
    port, start = mx.free_port(), time.monotonic()
    with pytest.raises(WeightTransferError, match=f"127.0.0.1:{port} .*UNAVAILABLE"):
        find_listed(f"127.0.0.1:{port}", model_name="m", dtype="bfloat16", revision="", timeout_s=0.1, rank=0)
    assert time.monotonic() - start < 30
