"""What goes to Redis comes back the same, and is what the reference server reads."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelexpress_harness import make_identity, make_worker
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.server import redis_layout as layout
from ramet.srt.modelexpress.server.redis_store import redact

UINT64 = st.integers(0, 2**64 - 1)
TENSORS = st.lists(
    st.builds(
        p2p_pb2.TensorDescriptor,
        name=st.text(max_size=5),
        addr=UINT64,
        size=UINT64,
        device_id=st.integers(0, 2**32 - 1),
        dtype=st.sampled_from(["", "torch.bfloat16"]),
    ),
    max_size=3,
)


def read(text: bytes, summary: layout.SummaryJson | None = None) -> p2p_pb2.WorkerMetadata:
    return p2p_pb2.WorkerMetadata.FromString(layout.decode_record(text).encode_with(summary))


@given(
    tensors=TENSORS,
    session=st.text(max_size=5) | st.none(),
    nixl=st.binary(max_size=5) | st.none(),
    text=st.text(max_size=5),
    rank=st.integers(0, 2**32 - 1),
    updated_at=st.integers(-(2**63), 2**63 - 1),
    topology=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)
def test_a_record_comes_back(tensors, session, nixl, text, rank, updated_at, topology) -> None:
    worker = p2p_pb2.WorkerMetadata(
        worker_rank=rank,
        status=2,
        updated_at=updated_at,
        metadata_endpoint=text,
        agent_name=text,
        worker_grpc_endpoint=text,
        accelerator=text,
        topology=topology,
        tensors=tensors,
        tensor_source=p2p_pb2.TensorSourceMetadata(tensors=tensors),
    )
    if session is not None:
        worker.transfer_engine_session_id = session
    elif nixl is not None:
        worker.nixl_metadata = nixl
    assert read(layout.encode_record(worker)) == worker


def test_an_artifact_comes_back() -> None:
    artifact = p2p_pb2.ArtifactSourceMetadata(
        artifact_id="a", total_size=2**63, file_count=1, chunk_count=2, node_rank=3
    )
    worker = p2p_pb2.WorkerMetadata(artifact_source=artifact)
    assert json.loads(layout.encode_record(worker))["artifact_source"]["total_size"] == str(2**63)
    assert read(layout.encode_record(worker)) == worker


def test_the_texts_are_the_reference_servers() -> None:
    worker = make_worker(1)
    record = json.loads(layout.encode_record(worker))
    assert record["tensors"][0] == {
        "name": "model.layers.0.mlp.down_proj.weight",
        "addr": str(1 << 40),
        "size": "128",
        "device_id": 0,
        "dtype": "torch.bfloat16",
    }
    assert record["backend_type"] == "transfer_engine"
    assert record["nixl_metadata"] == []
    assert "unknown_fields" not in record
    summary = json.loads(layout.encode_summary(worker))
    assert summary["worker_rank"] == 0 and summary["status"] == 2 and summary["accelerator"] == "cpu"
    assert "source_load" not in summary


def test_identities_come_back() -> None:
    identity = make_identity("modèle", role="draft", revision="r", quantization="fp8")
    assert layout.decode_identity(layout.encode_identity(identity)) == identity


def test_fields_of_later_versions_are_kept() -> None:
    later = p2p_pb2.WorkerMetadata.FromString(make_worker(1).SerializeToString() + b"\xc2\x3e\x03new")  # field 1000
    assert read(layout.encode_record(later)).SerializeToString() == later.SerializeToString()


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ({"transfer_engine_session_id": "h:1"}, "transfer_engine_session_id"),
        ({"nixl_metadata": [1, 255]}, "nixl_metadata"),
        ({}, None),
    ],
)
def test_records_without_a_backend_type(extra: dict[str, object], kind: str | None) -> None:
    text = msgspec.json.encode({"worker_rank": 1, "tensors": [], "some_new_key": 1} | extra)
    assert read(text).WhichOneof("backend_metadata") == kind


def test_numbers_that_lua_has_rounded_are_read() -> None:
    text = b'{"worker_rank":0,"tensors":[{"name":"a","addr":1.2345e+3,"size":7,"device_id":0,"dtype":""}]}'
    tensor = read(text).tensors[0]
    assert (tensor.addr, tensor.size) == (1234, 7)
    with pytest.raises(OverflowError):
        layout.decode_record(text.replace(b"1.2345e+3", b'"inf"'))


def test_a_newer_summary_counts_and_an_older_one_does_not() -> None:
    worker = p2p_pb2.WorkerMetadata(status=1, updated_at=100)
    newer = layout.SummaryJson(worker_rank=0, status=3, updated_at=100)
    older = layout.SummaryJson(worker_rank=0, status=3, updated_at=99)
    assert read(layout.encode_record(worker), newer).status == 3
    assert read(layout.encode_record(worker), older).status == 1
    forgotten = layout.SummaryJson(worker_rank=0, status=0, updated_at=0)
    worker.updated_at = 0
    assert read(layout.encode_record(worker), forgotten) == p2p_pb2.WorkerMetadata(tensor_source={})


def test_passwords_are_not_shown() -> None:
    assert redact("redis://user:secret@host:6379/2") == "redis://host:6379/2"
