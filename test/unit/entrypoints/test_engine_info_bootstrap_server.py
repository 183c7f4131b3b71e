"""Owns the tests of the engine info bootstrap server."""

import contextlib
import http.client
import json
import select
import socket
import threading
import time

import msgspec
import pytest
import seed_process
from ramet.srt.entrypoints import directory_http, engine_info_bootstrap_server
from ramet.srt.entrypoints.engine_info_bootstrap_server import EngineInfoBootstrapServer
from ramet.srt.model_loader.remote_instance_weight_loader_utils import register_transfer_engine_info
from ramet.srt.weights import registration
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.registration import SeedRegistration, TransferEngineInfo, parse_answer

INFO = {"session_id": "10.0.0.1:12345", "weights_info_dict": {"w": [4096, 10, 2]}}


@pytest.fixture
def server():
    server = EngineInfoBootstrapServer("127.0.0.1", 0)
    yield server
    server.close()


def call(server, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def put(server, document, **options):
    return call(server, "PUT", "/register_transfer_engine_info", json.dumps(document), **options)


def get(server, query):
    status, body = call(server, "GET", f"/get_transfer_engine_info?{query}")
    return status, json.loads(body)


def test_health(server):
    assert call(server, "GET", "/health") == (200, b"OK")
    assert call(server, "GET", "/nothing")[0] == 404
    assert call(server, "PUT", "/nothing", b"")[0] == 404
    assert call(server, "POST", "/health", b"")[0] == 501


def test_a_registration_is_answered_as_upstream_does(server):
    assert get(server, "rank=0")[0] == 404
    assert put(server, {"rank": 0, "transfer_engine_info": INFO}) == (200, b"OK")
    status, answer = get(server, "rank=0")
    assert status == 200
    expected = {"rank": 0, "remote_instance_transfer_engine_info": ["10.0.0.1:12345", {"w": [4096, 10, 2]}]}
    assert answer == expected
    assert server.get("target", 0) == expected
    assert server.get("draft", 0) is None


@pytest.mark.parametrize(
    ("ranks", "stored"), [({"tp_rank": 3}, 3), ({"rank": 0, "tp_rank": 3}, 0), ({"rank": None, "tp_rank": 2}, 2)]
)
def test_rank_wins_over_tp_rank_and_zero_is_a_rank(server, ranks, stored):
    assert put(server, ranks | {"transfer_engine_info": INFO})[0] == 200
    assert get(server, f"rank={stored}")[0] == 200


def test_roles_do_not_overwrite_each_other(server):
    for role, session_id in (("target", "t:1"), ("draft", "d:1")):
        assert (
            put(server, {"rank": 0, "role": role, "transfer_engine_info": INFO | {"session_id": session_id}})[0] == 200
        )
    assert get(server, "rank=0")[1]["remote_instance_transfer_engine_info"][0] == "t:1"
    assert get(server, "rank=0&role=draft")[1]["remote_instance_transfer_engine_info"][0] == "d:1"
    assert get(server, "rank=0&role=other")[0] == 400


def test_a_rank_that_registers_again_replaces_its_entry(server):
    for session_id in ("a:1", "a:2"):
        put(server, {"rank": 1, "transfer_engine_info": INFO | {"session_id": session_id}})
    assert get(server, "rank=1")[1]["remote_instance_transfer_engine_info"][0] == "a:2"


@pytest.mark.parametrize("rank", ["-1", "true", "1.0", "", "x", "1e3", "0x1", "1&rank=2", "99999999999", "%D9%A1"])
def test_a_rank_that_is_none_is_refused_with_a_reason(server, rank):
    status, answer = get(server, f"rank={rank}")
    assert status == 400 and "rank" in answer["detail"]


def test_a_rank_must_be_given(server):
    assert get(server, "")[0] == 400
    assert put(server, {"transfer_engine_info": INFO})[0] == 400


@pytest.mark.parametrize(
    "change",
    [
        {"rank": -1},
        {"rank": True},
        {"rank": "0"},
        {"rank": 1.5},
        {"rank": 0, "role": "other"},
        {"rank": 0, "transfer_engine_info": None},
        {"rank": 0, "transfer_engine_info": {"session_id": "a:1"}},
        {"rank": 0, "transfer_engine_info": INFO | {"session_id": ""}},
        {"rank": 0, "transfer_engine_info": INFO | {"session_id": 5}},
        {"rank": 0, "transfer_engine_info": INFO | {"weights_info_dict": {"w": [1, 2]}}},
        {"rank": 0, "transfer_engine_info": INFO | {"weights_info_dict": {"w": [True, 1, 2]}}},
        {"rank": 0, "transfer_engine_info": INFO | {"weights_info_dict": {"w": [-1, 1, 2]}}},
        {"rank": 0, "transfer_engine_info": INFO | {"weights_info_dict": {"w": [1, 1, 0]}}},
        {"rank": 0, "transfer_engine_info": INFO | {"weights_info_dict": {"w": [1 << 63, 1 << 62, 8]}}},
        {"rank": 0, "manifest": {"entries": []}},
    ],
)
def test_a_bad_registration_is_refused_with_a_reason(server, change):
    status, body = put(server, {"transfer_engine_info": INFO} | change)
    assert status == 400 and json.loads(body)["detail"]
    assert get(server, "rank=0")[0] == 404


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"5"])
def test_a_body_that_is_no_json_object_is_refused(server, body):
    assert call(server, "PUT", "/register_transfer_engine_info", body)[0] == 400


def test_a_body_that_is_too_long_is_refused_before_it_is_read(server):
    headers = {"Content-Length": str(registration.MAX_REGISTRATION_BYTES + 1)}
    assert call(server, "PUT", "/register_transfer_engine_info", b"", headers)[0] == 413
    headers = {"Content-Length": "-5"}
    assert call(server, "PUT", "/register_transfer_engine_info", b"", headers)[0] == 411


def test_what_is_ours_comes_back(server):
    manifest = seed_process.make_manifest(seed_process.DEFAULTS)
    document = {
        "rank": 0,
        "transfer_engine_info": INFO,
        "manifest": msgspec.to_builtins(manifest),
        "arena_address": 4096,
        "local_handle": {"host_identity": "h", "socket_name": "s"},
        "something_newer": 1,
    }
    assert put(server, document)[0] == 200
    answer = parse_answer(server.get_json("target", 0))
    assert answer.manifest == manifest and answer.arena_address == 4096 and answer.local_handle.socket_name == "s"
    assert put(server, document | {"role": "draft"})[0] == 400
    assert put(server, document | {"arena_address": None})[0] == 400


def test_defect_14_registering_needs_the_admin_key():
    server = EngineInfoBootstrapServer("127.0.0.1", 0, admin_api_key="secret")
    try:
        document = {"rank": 0, "transfer_engine_info": INFO}
        for header in (None, "Bearer wrong", "secret", "Bearer ", "Bearer secre", "Bearer s\xe9cret"):
            headers = {} if header is None else {"Authorization": header}
            assert put(server, document, headers=headers)[0] == 401
        assert get(server, "rank=0")[0] == 404
        registration = SeedRegistration(rank=0, transfer_engine_info=TransferEngineInfo(**INFO))
        with pytest.raises(WeightTransferError, match="401.*admin key"):
            register_transfer_engine_info(server.url, registration, admin_api_key="wrong", timeout_s=10)
        register_transfer_engine_info(server.url, registration, admin_api_key="secret", timeout_s=10)
        assert get(server, "rank=0")[0] == 200
    finally:
        server.close()


def test_defect_15_closing_frees_the_port():
    server = EngineInfoBootstrapServer("127.0.0.1", 0)
    idle = socket.create_connection(("127.0.0.1", server.port))  # an open connection must not keep it taken
    assert call(server, "GET", "/health")[0] == 200
    server.close()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        call(server, "GET", "/health")
    again = EngineInfoBootstrapServer("127.0.0.1", server.port)
    again.close()
    idle.close()
    assert not [t for t in threading.enumerate() if t.name == "engine-info-bootstrap"]


def test_a_port_in_use_is_named_with_its_flag(server):
    with pytest.raises(
        OSError, match=f"port {server.port} of 127.0.0.1 .--engine-info-bootstrap-port; 0 takes a free one"
    ):
        EngineInfoBootstrapServer("127.0.0.1", server.port)


def test_defect_3_registering_retries_and_then_fails():
    registration = SeedRegistration(rank=5, transfer_engine_info=TransferEngineInfo(**INFO))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening: refused until somebody listens
        port = taken.getsockname()[1]
        with pytest.raises(WeightTransferError, match=f"register failed for rank 5 of http://127.0.0.1:{port}"):
            register_transfer_engine_info(f"http://127.0.0.1:{port}", registration, admin_api_key=None, timeout_s=0.2)
    late: list[EngineInfoBootstrapServer] = []
    thread = threading.Timer(0.15, lambda: late.append(EngineInfoBootstrapServer("127.0.0.1", port)))
    thread.start()
    register_transfer_engine_info(f"http://127.0.0.1:{port}", registration, admin_api_key=None, timeout_s=20)
    assert late[0].get("target", 5)
    late[0].close()


def test_registering_gives_up_on_a_server_that_never_answers():
    registration = SeedRegistration(rank=0, transfer_engine_info=TransferEngineInfo(**INFO))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(WeightTransferError, match="no complete answer"):
            register_transfer_engine_info(url, registration, admin_api_key=None, timeout_s=0.5)


@pytest.fixture(autouse=True)
def quick_end(monkeypatch):
    monkeypatch.setattr(engine_info_bootstrap_server, "POLL_S", 0.01)


@pytest.fixture
def make_server():
    servers = []

    def make(**options):
        servers.append(EngineInfoBootstrapServer("127.0.0.1", 0, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


DOCUMENT = {"rank": 0, "transfer_engine_info": INFO}


@pytest.mark.parametrize(
    ("keys", "registering", "asking"),  # who may: a stranger, who has the API key, who has the admin key
    [
        ({}, [True, True, True], [True, True, True]),
        ({"api_key": "api"}, [False, True, False], [False, True, False]),
        ({"admin_api_key": "admin"}, [False, False, True], [True, True, True]),
        ({"api_key": "api", "admin_api_key": "admin"}, [False, False, True], [False, True, True]),
    ],
)
def test_each_key_protects(make_server, keys, registering, asking):
    server = make_server(**keys)
    headers = [{}, {"Authorization": "Bearer api"}, {"Authorization": "Bearer admin"}]
    assert [put(server, DOCUMENT, headers=one)[0] == 200 for one in headers] == registering
    statuses = [call(server, "GET", "/get_transfer_engine_info?rank=0", headers=one)[0] for one in headers]
    assert [status == 200 for status in statuses] == asking
    assert call(server, "GET", "/health")[0] == 200


def test_web_pages_and_strange_ranks_are_refused(make_server):
    server = make_server(num_ranks=2)
    assert put(server, DOCUMENT, headers={"Host": "evil.example"})[0] == 403
    assert put(server, DOCUMENT, headers={"Origin": "http://evil.example"})[0] == 403
    assert put(server, DOCUMENT | {"rank": 2})[0] == 400
    assert put(server, DOCUMENT | {"rank": 1})[0] == 200
    assert call(server, "GET", "/get_transfer_engine_info?" + "a=1&" * 100)[0] == 400
    assert call(server, "GET", "//[")[0] == 404


def test_bodies_and_connections_are_bounded(server, monkeypatch, caplog):
    module = directory_http
    monkeypatch.setattr(module, "MAX_ALL_BODIES_BYTES", 300_000)
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 6)
    head = b"PUT /register_transfer_engine_info HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    with contextlib.ExitStack() as stack:

        def connect(data):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
            connection.sendall(data)
            return connection

        connections = [connect(head + b"x" * 200_000) for _ in range(4)]
        refused = select.select(connections, [], [], 5)[0]
        assert refused and b" 503 " in refused[0].recv(1000)
        assert put(server, DOCUMENT)[0] == 200  # a small one has room
        waiting = [connect(b"GET /hea") for _ in range(12)]
        assert call(server, "GET", "/health")[0] == 200
        assert waiting[0].recv(10) == b""
    assert caplog.text.count("the engine info bootstrap server has") == 1


def test_headers_and_bodies_have_deadlines(server, monkeypatch):
    monkeypatch.setattr(directory_http, "HEADER_TIMEOUT_S", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as slow:
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < 3 and not select.select([slow], [], [], 0.05)[0]:
                slow.sendall(b"G")
        assert time.monotonic() - start < 2
