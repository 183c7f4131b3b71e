"""A record holds what every reader looks for, and is read back as it was meant."""

import json

import pytest
from modelexpress_harness import make_manifest
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import (
    FACTS_KEY,
    InstanceFacts,
    SourceTensor,
    build_worker_metadata,
    encode_facts,
    read_facts,
    read_source,
)
from ramet.srt.weights.report import LoadReport

FACTS = InstanceFacts(
    instance="http://10.0.0.1:30000",
    world_rank=5,
    layout_signature="d1",
    load=LoadReport(source="transfer_engine", num_bytes=10, seconds=0.5, taken_from=("w1",)),
)
URL = "http://10.0.0.1:30000/remote_instance_transfer_engine_info?rank=5&role=target"


def build() -> p2p_pb2.WorkerMetadata:
    return build_worker_metadata(
        make_manifest(2, tp_size=2, tp_rank=1, pp_size=2, pp_rank=1),
        base_address=1 << 47,
        session_id="10.0.0.1:15000",
        info_url=URL,
        facts=FACTS,
        accelerator="cuda",
        device_id=3,
        topology={"rack": "r1"},
    )


def test_tensors_are_written_for_old_and_new_readers() -> None:
    worker = build()
    assert worker.worker_rank == 3
    assert list(worker.tensors) == list(worker.tensor_source.tensors)
    assert worker.tensors[1] == p2p_pb2.TensorDescriptor(
        name="model.layers.1.mlp.down_proj.weight",
        addr=(1 << 47) + 256,
        size=128,
        device_id=3,
        dtype="torch.bfloat16",
    )
    assert worker.topology["rack"] == "r1"
    assert worker.WhichOneof("backend_metadata") == "transfer_engine_session_id"


def test_a_record_is_read_back() -> None:
    response = p2p_pb2.GetMetadataResponse(found=True, worker=build(), mx_source_id="s", worker_id="w")
    source = read_source(response)
    assert (source.source_id, source.worker_id, source.worker_rank) == ("s", "w", 3)
    assert source.tensors[0] == SourceTensor("model.layers.0.mlp.down_proj.weight", 1 << 47, 128, "bfloat16", 3)
    assert (source.session_id, source.info_url, source.facts) == ("10.0.0.1:15000", URL, FACTS)


def test_records_of_other_engines() -> None:
    """SGLang's first integration has no dtype and no payload; a NIXL worker has an endpoint that is no URL."""
    old = p2p_pb2.WorkerMetadata(
        tensors=[p2p_pb2.TensorDescriptor(name="a", addr=1, size=2)], metadata_endpoint="10.0.0.1:5555"
    )
    source = read_source(p2p_pb2.GetMetadataResponse(found=True, worker=old))
    assert source.tensors == (SourceTensor("a", 1, 2, "", 0),)
    assert (source.info_url, source.session_id, source.facts) == ("", "", None)
    artifact = p2p_pb2.WorkerMetadata(artifact_source=p2p_pb2.ArtifactSourceMetadata(artifact_id="x"))
    assert read_source(p2p_pb2.GetMetadataResponse(found=True, worker=artifact)).tensors == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"instance": 1}',
        '{"instance": "x", "load": {"source": 1}}',
        '{"instance": "x", "world_rank": 18446744073709551616}',
        '{"instance": "x", "load": {"source": "a", "seconds": 1, "num_bytes": 18446744073709551616}}',
        '{"x": ' + "[" * 30_000 + "]" * 30_000 + "}",
    ],
)
def test_facts_that_cannot_be_read_are_none(text: str) -> None:
    assert read_facts({"ramet": text}) is None


def test_facts_are_as_short_as_they_can_be() -> None:
    """Each row of a listing carries them, and servers and pages of other versions read them."""
    load = LoadReport(source="checkpoint", num_bytes=3, seconds=0.5, transfer_seconds=0.25)
    text = encode_facts(InstanceFacts(instance="http://a:1", load=load))
    assert text == '{"instance":"http://a:1","load":{"source":"checkpoint","num_bytes":3,"seconds":0.5}}'
    assert json.loads(encode_facts(FACTS))["load"] == {
        "source": "transfer_engine", "num_bytes": 10, "seconds": 0.5, "taken_from": ["w1"]
    }  # fmt: skip
    assert read_facts({FACTS_KEY: encode_facts(FACTS)}) == FACTS
