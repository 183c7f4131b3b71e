"""What calls itself a metadata server but is none: claims refused, listings lost, calls that hang, proxies between."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from modelexpress_harness import free_port, make_identity, open_client, running_server
from ramet.srt.configs.modelexpress_config import ModelExpressConfig
from ramet.srt.entrypoints.embedded_modelexpress import start_embedded_server
from ramet.srt.modelexpress.ages import AgeTracker
from ramet.srt.modelexpress.client.claim import FileClaim
from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.client.discovery import look_and_claim, search
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import InstanceFacts

IDENTITY = make_identity()
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


class BrokenServer:
    """The four calls of a server that takes nothing, lists nothing or does not answer."""

    def __init__(self, *, takes: bool, hangs: bool = False) -> None:
        self._takes = takes
        self._hangs = threading.Event()
        if not hangs:
            self._hangs.set()

    def let_go(self) -> None:
        self._hangs.set()

    def PublishMetadata(self, _request: Any, _context: Any) -> p2p_pb2.PublishMetadataResponse:
        self._hangs.wait(30)
        if self._takes:
            return p2p_pb2.PublishMetadataResponse(success=True, mx_source_id="ab", worker_id="w")
        return p2p_pb2.PublishMetadataResponse(success=False, message="Failed to publish metadata: OOM")

    def UpdateStatus(self, _request: Any, _context: Any) -> p2p_pb2.UpdateStatusResponse:
        return p2p_pb2.UpdateStatusResponse(success=self._takes)

    def ListSources(self, _request: Any, _context: Any) -> p2p_pb2.ListSourcesResponse:
        return p2p_pb2.ListSourcesResponse()

    def GetMetadata(self, _request: Any, _context: Any) -> p2p_pb2.GetMetadataResponse:
        return p2p_pb2.GetMetadataResponse(found=False)


@contextlib.contextmanager
def serving(broken: BrokenServer) -> Iterator[ModelExpressClient]:
    """A client of that server."""
    server = grpc.server(futures.ThreadPoolExecutor(8))
    service = p2p_pb2.DESCRIPTOR.services_by_name["P2pService"]
    handlers = {
        method.name: grpc.unary_unary_rpc_method_handler(
            getattr(broken, method.name),
            request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
            response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
        )
        for method in service.methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with open_client(f"127.0.0.1:{port}") as client:
            yield client
    finally:
        broken.let_go()
        server.stop(0).wait(10)


def make_claim(client: ModelExpressClient, **options: Any) -> FileClaim:
    return FileClaim(lambda: open_client(client.address), IDENTITY, InstanceFacts(instance="me"), **options)


@pytest.mark.parametrize("hangs", [False, True], ids=["refuses", "hangs"])
def test_a_claim_that_is_not_taken_is_an_outage(hangs: bool) -> None:
    """Not somebody else's claim, for which one would wait ten minutes."""
    with serving(BrokenServer(takes=False, hangs=hangs)) as client:
        start = time.monotonic()
        with pytest.raises(ModelExpressError, match="the claim to read the files .* NOT TAKEN") as raised:
            search(client, IDENTITY, 0, claim=make_claim(client, ack_timeout_s=0.5), timeout_s=600)
        assert time.monotonic() - start < 20
    if not hangs:
        assert "OOM" in str(raised.value), "the server's own reason"


def test_a_server_that_lists_nothing_keeps_nobody_from_the_files(caplog: pytest.LogCaptureFixture) -> None:
    with serving(BrokenServer(takes=True)) as client, caplog.at_level(logging.WARNING):
        claim = make_claim(client)
        found, _ = look_and_claim(client, IDENTITY, 0, claim, (), AgeTracker(wall_ms=None))
        claim.release()
    assert found is not None and found.holds_claim
    assert "does not list it: others may read them too" in caplog.text


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> str:
    """Every variable that names a proxy names one that nobody answers at."""
    url = f"http://127.0.0.1:{free_port()}"
    for name in PROXY_VARIABLES:
        monkeypatch.setenv(name, url)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    return url


def test_no_proxy_stands_between_instances(dead_proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server() as server:
        with open_client(server.address) as client:
            assert client.list_sources() == []
        monkeypatch.setenv("RAMET_FABRIC_PROXY", "1")
        with ModelExpressClient(server.address, timeout_s=2, environ={}) as client, pytest.raises(ModelExpressError):
            client.list_sources()


def test_a_second_instance_finds_the_embedded_server_whatever_the_proxy(dead_proxy: str) -> None:
    config = ModelExpressConfig(url=f"embedded:{free_port()}")
    first, url = start_embedded_server(config, "127.0.0.1", "127.0.0.1", True)
    assert first is not None
    try:
        assert start_embedded_server(config, "127.0.0.1", "127.0.0.1", True) == (None, url)
    finally:
        first.close(0)


def test_what_keeps_an_embedded_server_from_its_port_is_said(dead_proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only that the port is taken: why the server that has it could not be used, too."""
    monkeypatch.setenv("RAMET_FABRIC_PROXY", "1")  # a proxy that was asked for and does not work
    monkeypatch.setattr("ramet.srt.entrypoints.embedded_modelexpress.PROBE_TIMEOUT_S", 1.0)
    monkeypatch.setattr("ramet.srt.entrypoints.embedded_modelexpress.TAKEN_PATIENCE_S", 0.0)
    config = ModelExpressConfig(url=f"embedded:{free_port()}")
    first, _ = start_embedded_server(config, "127.0.0.1", "127.0.0.1", True)
    assert first is not None
    try:
        with pytest.raises(ValueError, match="Address already in use.*no ModelExpress server that this instance could "
                                             "use answers at .*: (UNAVAILABLE|DEADLINE_EXCEEDED)"):  # fmt: skip
            start_embedded_server(config, "127.0.0.1", "127.0.0.1", True)
    finally:
        first.close(0)
