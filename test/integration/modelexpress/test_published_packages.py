"""The modelexpress packages from PyPI, each in its own environment and process, with our server and our client."""

import json
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modelexpress_harness import free_port, make_identity, make_worker, running_server, wait_until
from published_modelexpress import VERSIONS, run_driver, start_driver
from ramet.srt.modelexpress.client.claim import FileClaim
from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.client.discovery import fetch_source, find_sources, search
from ramet.srt.modelexpress.client.publisher import READY, STALE, Publisher
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import InstanceFacts
from ramet.srt.modelexpress.source_identity import compute_source_id

pytestmark = pytest.mark.slow  # makes environments, from the network the first time

ASCII = st.text(st.characters(max_codepoint=126), max_size=12)  # 127 too is escaped by Python and not by the server
SIZES = st.integers(0, 2**32 - 1)
IDENTITIES = st.fixed_dictionaries(
    {
        "mx_version": ASCII,
        "mx_source_type": st.integers(0, 9),
        "model_name": ASCII,
        "backend_framework": st.integers(0, 3),
        "tensor_parallel_size": SIZES,
        "pipeline_parallel_size": SIZES,
        "expert_parallel_size": SIZES,
        "dtype": ASCII,
        "quantization": ASCII,
        "extra_parameters": st.dictionaries(st.sampled_from("aAbBcC") | ASCII, ASCII, max_size=5),
        "revision": ASCII,
        "backend_framework_version": ASCII,
        "torch_version": ASCII,
        "cuda_version": ASCII,
        "triton_version": ASCII,
        "gpu_arch": ASCII,
        "compile_config_digest": ASCII,
    }
)


@pytest.mark.parametrize("version", VERSIONS)
def test_their_client_with_our_server(version: str) -> None:
    with running_server() as server:
        result = run_driver(version, "call_everything", server.address)
        assert result == {
            "source_id": compute_source_id(make_identity()),
            "ready_before": 0,
            "updated": True,
            "updated_unknown": False,
            "ready": ["w1"],
            "all": ["org/model"],
            "found": True,
            "tensors": [[f"t{i}", 2**63 + i, 16, ""] for i in range(3)],
            "session_id": "127.0.0.1:9",
            "unknown": False,
            "error": "PublishMetadata failed: identity.model_name is required",
        }
        with ModelExpressClient(server.address, environ={}) as client:
            (ref,) = find_sources(client, make_identity(), 0)
            source = fetch_source(client, ref)
            assert source is not None and [tensor.dtype for tensor in source.tensors] == [""] * 3


@pytest.mark.parametrize("version", VERSIONS)
def test_their_client_reads_what_we_publish(version: str) -> None:
    with running_server() as server:
        publisher = Publisher(ModelExpressClient(server.address, environ={}), make_identity(), make_worker())
        publisher.start()
        assert publisher.set_status(READY, timeout_s=10)
        source_id = compute_source_id(make_identity())
        result = run_driver(version, "read_record", server.address, source_id, publisher.worker_id)
        tensors = [[t.name, t.addr, t.size, "torch.bfloat16"] for t in make_worker().tensors]
        assert result["listed"] == [publisher.worker_id]
        assert result["tensors"] == tensors
        assert result["payload"] == ([] if version == "0.3.0" else tensors)
        assert result["kind"] == "transfer_engine_session_id"
        publisher.close()


@pytest.fixture(params=VERSIONS)
def their_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server made from the published package's stubs."""
    process = start_driver(request.param, "serve")
    assert process.stdout is not None and process.stdin is not None
    try:
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.communicate("", timeout=20)


def test_our_client_with_their_server(their_server: str) -> None:
    with ModelExpressClient(their_server, environ={}) as client:
        source_id = client.publish(make_identity(), "w1", make_worker(status=1))
        assert find_sources(client, make_identity(), 0) == []
        assert client.update_status(source_id, "w1", 0, READY, load=0.5)
        assert not client.update_status(source_id, "w2", 0, READY)
        (ref,) = find_sources(client, make_identity(), 0)
        source = fetch_source(client, ref)
        assert source is not None and len(source.tensors) == 3 and source.tensors[0].dtype == "bfloat16"
        assert source.info_url == "http://127.0.0.1:30000/remote_instance_transfer_engine_info?rank=0&role=target"
        assert client.list_sources(make_identity(), worker_rank=1) == []
        assert client.list_sources(model_name="other") == []
        with pytest.raises(ModelExpressError, match="REFUSED: identity.model_name is required"):
            client.publish(p2p_pb2.SourceIdentity(), "w1", make_worker())


def test_our_publisher_and_claim_with_their_server(their_server: str) -> None:
    """A claim works where listings have no times: 0.3's rows hold none."""

    def claim(name: str) -> FileClaim:
        return FileClaim(
            lambda: ModelExpressClient(their_server, environ={}),
            make_identity(),
            InstanceFacts(instance=name),
            renewal_s=0.1,
            silence_s=1.0,
        )

    with ModelExpressClient(their_server, environ={}) as client:
        first, second = claim("first"), claim("second")
        assert search(client, make_identity(), 0, claim=first, timeout_s=10).holds_claim
        assert not second.try_acquire(client)
        publisher = Publisher(ModelExpressClient(their_server, environ={}), make_identity(), make_worker())
        publisher.start()
        assert publisher.set_status(READY, timeout_s=10)
        first.release()
        found = search(client, make_identity(), 0, claim=second, timeout_s=10)
        assert [ref.worker_id for ref in found.sources] == [publisher.worker_id]
        publisher.close()
        assert len(client.list_sources(make_identity(), status=STALE)) == 1


@pytest.fixture(scope="module")
def their_function() -> Iterator[subprocess.Popen[str]]:
    process = start_driver("0.7.0", "compute_ids")
    yield process
    process.communicate(timeout=20)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(identity=IDENTITIES)
def test_source_ids_are_theirs(their_function: subprocess.Popen[str], identity: dict[str, object]) -> None:
    assert their_function.stdin is not None and their_function.stdout is not None
    their_function.stdin.write(json.dumps(identity) + "\n")
    their_function.stdin.flush()
    assert their_function.stdout.readline().strip() == compute_source_id(p2p_pb2.SourceIdentity(**identity))


def test_their_publisher_thread_finds_back_after_a_restart_of_our_server() -> None:
    port = free_port()
    with running_server(port=port) as server:
        process = start_driver("0.7.0", "keep_published", server.address)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "started"
        with ModelExpressClient(server.address, environ={}) as client:
            (ref,) = wait_until(lambda: find_sources(client, make_identity(), 0), what="READY")
            assert ref.source_load == 0.5
    with running_server(port=port) as server, ModelExpressClient(server.address, environ={}) as client:
        wait_until(lambda: find_sources(client, make_identity(), 0), 60, "READY after the restart")
        process.communicate("", timeout=30)
        assert len(client.list_sources(make_identity(), status=STALE)) == 1


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_both_stubs_in_one_process(version: str, first: str) -> None:
    result = run_driver(version, "import_both", first)
    assert result == {"same_bytes": True, "id": compute_source_id(p2p_pb2.SourceIdentity(model_name="a"))}
