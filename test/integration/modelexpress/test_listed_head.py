"""What a client without files learns of a model's output head from the records at a metadata server."""

import threading

import msgspec
import pytest
from modelexpress_harness import make_manifest, open_client
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.modelexpress.ages import wall_clock_ms
from ramet.srt.modelexpress.client.listed_head import look_whether_tied
from ramet.srt.modelexpress.client.publisher import INITIALIZING, READY
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import InstanceFacts, build_worker_metadata, make_instance_facts
from ramet.srt.modelexpress.server.server import ModelExpressServer
from ramet.srt.modelexpress.source_identity import make_source_identity

UNSAID = InstanceFacts(instance="http://127.0.0.1:1")  # as older versions publish it


def config_of(server: ModelExpressServer, tp_size: int = 1, wait_s: float = 20.0) -> LoadConfig:
    return LoadConfig(
        load_format="remote_instance", modelexpress_url=server.address, modelexpress_model_name="toy",
        modelexpress_dtype="bfloat16", modelexpress_tp_size=tp_size, modelexpress_wait_s=wait_s,
    )  # fmt: skip


def publish(
    server: ModelExpressServer, facts: InstanceFacts, tp_size: int = 1, status: "p2p_pb2.SourceStatus" = READY
) -> None:
    manifest = make_manifest(tp_size=tp_size)
    worker = build_worker_metadata(manifest, base_address=0, session_id="", info_url="http://127.0.0.1:1", facts=facts)
    worker.status, worker.updated_at = status, wall_clock_ms()
    with open_client(server.address) as client:
        client.publish(make_source_identity(config_of(server, tp_size), manifest), facts.instance, worker)


def facts_of(is_tied: bool, instance: str = "http://127.0.0.1:2") -> InstanceFacts:
    return make_instance_facts(instance, 1.0, msgspec.structs.replace(make_manifest(), is_tied=is_tied))


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_source_of_any_topology_says_it(server: ModelExpressServer, tp_size: int) -> None:
    publish(server, UNSAID, tp_size)
    assert look_whether_tied(config_of(server), make_manifest(), can_read_files=False) is None
    publish(server, facts_of(False), tp_size)
    assert look_whether_tied(config_of(server), make_manifest(), can_read_files=False) is False


def test_a_tied_head_is_said_too(server: ModelExpressServer) -> None:
    publish(server, facts_of(True))
    assert look_whether_tied(config_of(server), make_manifest(), can_read_files=True) is True


def test_who_can_read_files_does_not_wait(server: ModelExpressServer) -> None:
    publish(server, facts_of(False), status=INITIALIZING)
    assert look_whether_tied(config_of(server), make_manifest(), can_read_files=True) is None
    assert look_whether_tied(config_of(server, wait_s=0.1), make_manifest(), can_read_files=False) is None


def test_who_has_no_files_waits_for_a_source(server: ModelExpressServer) -> None:
    words: list[bool | None] = []
    asking = threading.Thread(
        target=lambda: words.append(look_whether_tied(config_of(server), make_manifest(), can_read_files=False))
    )
    asking.start()
    publish(server, facts_of(False))
    asking.join(20)
    assert words == [False]
