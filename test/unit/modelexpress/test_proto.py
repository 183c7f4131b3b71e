"""The stubs are what `make proto` writes, and live in a descriptor pool of their own."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from ramet.srt.modelexpress.proto import health_pb2, p2p_pb2
from ramet.srt.modelexpress.proto.private_pool import decode_descriptor

ROOT = Path(__file__).resolve().parents[3]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_proto", ROOT / "scripts" / "make_proto.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("module", [p2p_pb2, health_pb2])
def test_the_stubs_are_current(module: ModuleType) -> None:
    pytest.importorskip("grpc_tools")
    script = load_script()
    path = script.FOLDER / module.DESCRIPTOR.name
    descriptor, stub = script.compile_proto(path)
    committed = descriptor_pb2.FileDescriptorProto.FromString(decode_descriptor(module.ENCODED_DESCRIPTOR))
    assert committed == descriptor_pb2.FileDescriptorProto.FromString(descriptor), "run `make proto`"
    classes = [line for line in stub.splitlines() if line.lstrip().startswith("class ")]
    written = path.with_name(f"{path.stem}_pb2.pyi").read_text()
    assert [line for line in written.splitlines() if line.lstrip().startswith("class ")] == classes, "run `make proto`"


def test_the_default_pool_is_left_alone() -> None:
    for name in ("model_express.p2p.SourceIdentity", "grpc.health.v1.HealthCheckRequest"):
        pool = p2p_pb2.DESCRIPTOR.pool if name.startswith("model") else health_pb2.DESCRIPTOR.pool
        assert pool is not descriptor_pool.Default()
        assert pool.FindMessageTypeByName(name).full_name == name
