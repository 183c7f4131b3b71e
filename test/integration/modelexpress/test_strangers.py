"""What whoever reaches a metadata server can do to it, and to those who read its log."""

import contextlib
import json
import logging
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from modelexpress_harness import make_identity, make_worker, open_client, running_server, wait_until
from ramet.srt.configs.modelexpress_config import ModelExpressConfig
from ramet.srt.entrypoints.embedded_modelexpress import start_embedded_server
from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.client.discovery import drop_dead
from ramet.srt.modelexpress.client.seed_search import Candidate
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import FACTS_KEY
from ramet.srt.modelexpress.server import intake, store
from ramet.srt.modelexpress.server import server as server_module
from ramet.srt.modelexpress.server.server import ModelExpressServer
from ramet.srt.utils.http_guard import HttpLimits

FORGED = "x\n[2026-01-01 00:00:00 server] ERROR forged\x1b[2J"


def is_closed(connection: socket.socket) -> bool:
    """Whether it ends, with or without an answer before."""
    with contextlib.suppress(BlockingIOError):
        try:
            while connection.recv(1 << 16, socket.MSG_DONTWAIT):
                pass
            return True
        except ConnectionResetError:
            return True
    return False


def connect(server: ModelExpressServer) -> socket.socket:
    host, port = server.http_url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def test_half_sent_requests_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HTTP_LIMITS", HttpLimits(max_connections=9, header_s=0.3))
    with running_server() as server, contextlib.ExitStack() as stack:
        halves = [stack.enter_context(connect(server)) for _ in range(3)]
        halves[1].sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        halves[2].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        halves[2].settimeout(5)
        answer = b""
        while not answer.endswith(b"OK\n"):
            answer += halves[2].recv(1 << 16)
        halves[2].sendall(b"GET / HTTP/1.1\r\n")
        for half in halves:
            wait_until(lambda half=half: is_closed(half), 5, "the end of a half-sent request")
        assert urllib.request.urlopen(f"{server.http_url}/health", timeout=5).status == 200


def test_there_are_only_so_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HTTP_LIMITS", HttpLimits(max_connections=3))
    with running_server() as server, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(5)]
        wait_until(lambda: sum(map(is_closed, connections)) == 2, 5, "the end of two connections")


def test_a_full_server_refuses_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_RECORDS", 2)
    with running_server() as server, open_client(server.address) as client:
        identity = make_identity()
        source_id = client.publish(identity, "w1", make_worker())
        client.publish(identity, "w2", make_worker())
        with pytest.raises(ModelExpressError, match="the server is full: 2 records"):
            client.publish(identity, "w3", make_worker())
        client.publish(identity, "w1", make_worker(num_tensors=5))
        assert client.get_metadata(source_id, "w1").found and len(client.list_sources()) == 2
        monkeypatch.setattr(store, "MAX_STORED_BYTES", 2000)
        with pytest.raises(ModelExpressError, match="the server is full"):
            client.publish(identity, "w1", make_worker(num_tensors=5000))


def test_texts_that_every_listing_repeats_are_bounded() -> None:
    with running_server() as server, open_client(server.address) as client:
        worker = make_worker()
        worker.topology["x"] = "y" * 100_000
        with pytest.raises(ModelExpressError, match="topology is longer than"):
            client.publish(make_identity(), "w", worker)
        for identity, worker_id in ((make_identity("m" * 5000), "w"), (make_identity(), "w" * 5000)):
            with pytest.raises(ModelExpressError, match="a text is longer than"):
                client.publish(identity, worker_id, make_worker())


def test_what_a_stranger_wrote_stays_in_its_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with running_server() as server, open_client(server.address) as client:
        worker = make_worker(instance=FORGED)
        client.publish(make_identity(FORGED), FORGED, worker)
        (ref,) = client.list_sources()
        assert json.loads(ref.topology[FACTS_KEY])["instance"] == FORGED
        assert "\n" not in Candidate([ref]).name and "\x1b" not in Candidate([ref]).name
        fleet = urllib.request.urlopen(f"{server.http_url}/fleet.json", timeout=5).read()
        assert b"\x1b" not in fleet and json.loads(fleet)["models"][0]["model_name"] == FORGED
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "published 3 tensors" in line]
    assert not [line for line in lines if "\n" in line or "\x1b" in line]
    error = ModelExpressError("PublishMetadata", "a:1", "REFUSED", FORGED)
    assert "\n" not in str(error) and "\x1b" not in error.details


def test_a_server_that_is_open_to_strangers_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokens").write_text("t\n")
    for options in ({}, {"host": "0.0.0.0", "auth_token_file": str(tmp_path / "tokens")}):
        with running_server(**options):
            assert "OPEN TO STRANGERS" not in caplog.text
    with running_server(host="0.0.0.0"):
        (record,) = [record for record in caplog.records if "OPEN TO STRANGERS" in record.getMessage()]
    assert record.levelno == logging.WARNING and "--auth-token-file" in record.getMessage()


def test_an_embedded_server_asks_for_the_token_that_its_clients_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens").write_text("t\n")
    monkeypatch.setenv("MX_AUTH_TOKEN_PATH", str(tmp_path / "tokens"))
    server, url = start_embedded_server(ModelExpressConfig(url="embedded:0"), "127.0.0.1", "127.0.0.1", True)
    assert server is not None
    try:
        with ModelExpressClient(url) as friend:
            assert friend.list_sources() == []
        with open_client(url) as stranger, pytest.raises(ModelExpressError, match="UNAUTHENTICATED"):
            stranger.list_sources()
    finally:
        server.close(0)


def call_of(address: str, method: str, options: list[tuple[str, int]] | None = None) -> tuple[grpc.Channel, Any]:
    """A channel of its own, and the method on it as one whose client streams: it can leave its message out."""
    channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1), *(options or [])])
    name = p2p_pb2.DESCRIPTOR.services_by_name["P2pService"].full_name
    return channel, channel.stream_unary(f"/{name}/{method}")


@pytest.mark.parametrize("has_tokens", [False, True])
def test_calls_whose_message_never_comes_keep_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_tokens: bool
) -> None:
    monkeypatch.setattr(server_module, "MAX_CONCURRENT_CALLS", 48)
    monkeypatch.setattr(intake, "CROWD", 8)
    monkeypatch.setattr(intake, "PATIENCE_S", 0.05)
    end = threading.Event()

    def nothing() -> Iterator[bytes]:
        end.wait(30)
        yield from ()

    tokens = tmp_path / "tokens"
    tokens.write_text("right\n")
    token_file = str(tokens) if has_tokens else None
    with (
        running_server(auth_token_file=token_file) as server,
        ModelExpressClient(server.address, token_file=token_file, environ={}) as client,
    ):
        channel, call = call_of(server.address, "ListSources")
        calls = [call.future(nothing()) for _ in range(40)]
        try:
            for _ in range(20):
                assert client.list_sources() == []
                time.sleep(0.01)
            num_ended = 40 if has_tokens else 30
            wait_until(lambda: sum(one.done() for one in calls) >= num_ended, 10, "the end of the calls")
        finally:
            end.set()
            channel.close()


def test_large_messages_together_are_bounded_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_HELD_BYTES", 3 << 20)
    identity, worker = make_identity(), make_worker()
    worker.nixl_metadata = bytes(2 << 20)
    message = p2p_pb2.PublishMetadataRequest(identity=identity, worker_id="w", worker=worker).SerializeToString()
    with running_server() as server, open_client(server.address) as client:
        made = [call_of(server.address, "PublishMetadata") for _ in range(8)]
        calls = [call.future(iter([message])) for _, call in made]
        codes = [one.code() for one in calls]
        for channel, _ in made:
            channel.close()
        assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert grpc.StatusCode.OK in codes
        channel, call = call_of(server.address, "PublishMetadata")
        assert p2p_pb2.PublishMetadataResponse.FromString(call(iter([message]))).success
        channel.close()
        assert len(client.list_sources()) == 1


@pytest.mark.parametrize("data", [b"\xff\xff\xff", None])
def test_a_message_that_is_none_is_the_callers_mistake(data: bytes | None) -> None:
    with running_server() as server:
        channel, call = call_of(server.address, "ListSources")
        with pytest.raises(grpc.RpcError) as refused:
            call(iter([] if data is None else [data]), timeout=5)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        channel.close()


@pytest.mark.parametrize(
    ("parameters", "facts"),
    [
        ({"training_step": "9" * 5000}, "{}"),
        ({}, '{"instance": "x", "world_rank": 1' + "0" * 30 + "}"),
        ({}, '{"instance": "x", "load": {"source": "a", "seconds": 1, "num_bytes": 18446744073709551616}}'),
        ({}, '{"instance": "x", "load": {"source": "a", "seconds": 1, "num_bytes": 1, "taken_bytes": [1e30]}}'),
        ({}, '{"x": ' + "[" * 30000 + "]" * 30000 + "}"),
    ],
)
def test_no_record_keeps_others_from_being_listed(parameters: dict[str, str], facts: str) -> None:
    with running_server() as server, open_client(server.address) as client:
        client.publish(make_identity("org/good"), "good", make_worker())
        worker = make_worker()
        worker.topology[FACTS_KEY] = facts
        identity = make_identity("org/odd")
        identity.extra_parameters.update(parameters)
        client.publish(identity, "odd", worker)
        refs = client.list_sources()
        assert {ref.worker_id for ref in refs} == {"good", "odd"}
        assert len(drop_dead(refs)) == 2
        with urllib.request.urlopen(f"{server.http_url}/fleet.json", timeout=5) as answer:
            assert len(json.load(answer)["models"]) == 2
