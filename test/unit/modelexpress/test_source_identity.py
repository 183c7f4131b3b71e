"""The source id follows the reference server, and an engine's identity is the same for seed and client."""

import json

import pytest
from modelexpress_harness import make_manifest
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.source_identity import (
    EngineValues,
    build_source_identity,
    canonical_json,
    compute_source_id,
    make_source_identity,
    same_model,
)
from ramet.srt.server_args import ServerArgs

ENGINE = EngineValues(model_name="Org/Model", dtype="torch.bfloat16", revision="abc", tp_size=2)


def reference_identity(**changes: object) -> p2p_pb2.SourceIdentity:
    values: dict[str, object] = {
        "mx_version": "0.5.0",
        "mx_source_type": p2p_pb2.MX_SOURCE_TYPE_WEIGHTS,
        "model_name": "deepseek-ai/DeepSeek-V3",
        "backend_framework": p2p_pb2.BACKEND_FRAMEWORK_VLLM,
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 1,
        "dtype": "bfloat16",
    }
    return p2p_pb2.SourceIdentity(**values | changes)


@pytest.mark.parametrize(
    ("changes", "source_id"),
    [
        ({}, "5a5f555570065064"),
        ({"revision": "abc123def4567890"}, "d0c184b2a9a34c82"),
        ({"extra_parameters": {"Foo": "a", "foo": "b"}}, "bf71fb9340cd940a"),
        ({"extra_parameters": {"foo": "b", "Foo": "A"}}, "bf71fb9340cd940a"),
        ({"model_name": "DeepSeek-AI/deepseek-v3", "dtype": "BFloat16"}, "5a5f555570065064"),
    ],
)
def test_the_reference_servers_ids(changes: dict[str, object], source_id: str) -> None:
    assert compute_source_id(reference_identity(**changes)) == source_id


def test_text_that_is_not_ascii_is_hashed_as_it_is() -> None:
    assert '"model_name":"modèle/木"' in canonical_json(reference_identity(model_name="Modèle/木"))


def test_optional_fields_count_only_when_they_are_set() -> None:
    assert "torch_version" not in canonical_json(reference_identity())
    assert '"torch_version":"2.11.0+cu130"' in canonical_json(reference_identity(torch_version="2.11.0+CU130"))


def test_identity_of_an_engine() -> None:
    identity = build_source_identity(ENGINE)
    assert identity.model_name == "Org/Model"
    assert identity.dtype == "bfloat16"
    assert identity.backend_framework == p2p_pb2.BACKEND_FRAMEWORK_SGLANG
    sizes = (identity.tensor_parallel_size, identity.pipeline_parallel_size, identity.expert_parallel_size)
    assert sizes == (2, 1, 1)
    assert not identity.extra_parameters


def test_the_config_gives_names_in_place_of_the_engines() -> None:
    express = {"source": True, "url": "a:1", "model_name": "shown", "dtype": "bf16", "quantization": "fp8"}
    args = ServerArgs(model_path="org/model", modelexpress_config=json.dumps(express))
    identity = make_source_identity(args.load_config(dtype="bfloat16", quantization=""), make_manifest())
    assert (identity.model_name, identity.dtype, identity.quantization) == ("shown", "bf16", "fp8")


def test_role_and_revision_set_sources_apart() -> None:
    def source_id(**changes: object) -> str:
        values = {"model_name": "m", "dtype": "bfloat16", "revision": "one"} | changes
        return compute_source_id(build_source_identity(EngineValues(**values)))

    assert len({source_id(), source_id(role="draft"), source_id(revision="two"), source_id(quantization="fp8")}) == 4
    assert source_id() == source_id(model_name="M")


def test_same_model_looks_at_everything_but_sizes() -> None:
    one = reference_identity()
    assert same_model(one, reference_identity(tensor_parallel_size=2, pipeline_parallel_size=4))
    assert not same_model(one, reference_identity(tensor_parallel_size=2, revision="other"))
    assert not same_model(one, reference_identity(extra_parameters={"model_role": "draft"}))
