"""What whoever reaches a metadata server can do to it, and to those who read its log."""

import contextlib
import json
import logging
import socket
import urllib.request
from pathlib import Path

import pytest
from modelexpress_harness import make_identity, make_worker, open_client, running_server, wait_until
from ramet.srt.configs.modelexpress_config import ModelExpressConfig
from ramet.srt.entrypoints.embedded_modelexpress import start_embedded_server
from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.client.seed_search import Candidate
from ramet.srt.modelexpress.records import FACTS_KEY
from ramet.srt.modelexpress.server import server as server_module
from ramet.srt.modelexpress.server import store
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
