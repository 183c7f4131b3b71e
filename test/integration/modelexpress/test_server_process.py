"""The server as a process: its start, its stop, its ports, its tokens and certificates, and what it survives."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from modelexpress_harness import free_port, make_identity, make_worker, running_server, wait_until
from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.proto import health_pb2, p2p_pb2
from ramet.srt.modelexpress.rpc import client_calls
from ramet.srt.modelexpress.server.server import ModelExpressServer, ServerOptions

READY = p2p_pb2.SOURCE_STATUS_READY
MODULE = [sys.executable, "-m", "ramet.modelexpress_server"]


class ServerProcess:
    def __init__(self, log: Path, *flags: str):
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen([*MODULE, "--port", "0", "--metrics-port", "0", *flags], stderr=file)
        self.address, self.http_url = wait_until(self._read_addresses, 30, "the server's line")

    def _read_addresses(self) -> tuple[str, str] | None:
        if self.process.poll() is not None:
            pytest.fail(f"the server has ended: {self.log.read_text()}")
        match = re.search(r"gRPC on (\S+), fleet page on (\S+)/,", self.log.read_text())
        return (match[1], match[2]) if match else None


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[ServerProcess] = []

    def start_server(*flags: str) -> ServerProcess:
        started.append(ServerProcess(tmp_path / f"server{len(started)}.log", *flags))
        return started[-1]

    yield start_server
    for server in started:
        server.process.kill()
        server.process.wait(10)


def fetch(url: str, token: str | None = None, context: Any = None) -> bytes:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        return answer.read()


def test_it_serves_and_ends_at_sigterm(start: Any) -> None:
    server = start()
    with ModelExpressClient(server.address, environ={}) as client:
        client.publish(make_identity(), "w1", make_worker())
        assert len(client.list_sources(status=READY)) == 1
        assert json.loads(fetch(server.http_url + "/fleet.json"))["models"][0]["model_name"] == "org/model"
        metrics = fetch(server.http_url + "/metrics").decode()
        assert 'ramet_modelexpress_calls_total{method="PublishMetadata",outcome="ok"} 1.0' in metrics
        assert fetch(server.http_url + "/health") == b"OK\n"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0
        with pytest.raises(
            ModelExpressError, match=f"ListSources at ModelExpress server {server.address} failed: UNAV"
        ):
            client.list_sources()


def test_it_never_imports_torch() -> None:
    code = (
        "import sys, threading\n"
        "from ramet.srt.modelexpress.server.server import ModelExpressServer, ServerOptions\n"
        "import ramet.srt.modelexpress.server.command_line, ramet.srt.modelexpress.server.redis_store\n"
        "server = ModelExpressServer(ServerOptions(port=0, metrics_port=0)); server.start(); server.close()\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_in_use_is_one_line(flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"--port": "0", "--metrics-port": "0"} | {flag: str(port)}
        command = [*MODULE, *(part for pair in ports.items() for part in pair)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert f"127.0.0.1:{port}" in line and "Address already in use" in line and f"choose another with {flag}" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "99999"], "--port must be a port number"),
        (["--heartbeat-timeout", "0"], "--heartbeat-timeout must be above 0"),
        (["--tls-cert", "x"], "--tls-cert and --tls-key are needed together"),
        (["--tls-cert", "/nothing", "--tls-key", "/nothing"], "--tls-cert: "),
        (["--auth-token-file", "/nothing"], "cannot read the token file"),
        (["--host", "no.such.host.invalid"], "cannot bind no.such.host.invalid"),
        (["--redis", "x"], "unrecognized arguments: --redis"),
    ],
)
def test_what_is_wrong_is_one_line(flags: list[str], message: str) -> None:
    command = [*MODULE, "--port", "0", "--metrics-port", "0", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


def test_the_console_script_starts_it_too() -> None:
    command = [sys.executable, "-m", "ramet.cli", "modelexpress-server", "--port", "99999"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("ramet modelexpress-server: error: --port must be a port number")


def test_a_bad_environment_is_one_line() -> None:
    environ = os.environ | {"MX_HEARTBEAT_TIMEOUT_SECS": "soon"}
    command = [*MODULE, "--port", "0", "--metrics-port", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    assert result.returncode == 1 and "MX_HEARTBEAT_TIMEOUT_SECS" in result.stderr


def test_the_port_is_free_after_close() -> None:
    port = free_port()
    for _ in range(2):
        with running_server(port=port) as server, ModelExpressClient(server.address, environ={}) as client:
            assert client.list_sources() == []


def test_health_checks() -> None:
    service = health_pb2.DESCRIPTOR.services_by_name["Health"]
    with running_server() as server, grpc.insecure_channel(server.address) as channel:
        check = client_calls(channel, service)["Check"]
        for name in ("", "model_express.p2p.P2pService"):
            answer = check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(health_pb2.HealthCheckRequest(service="other"), timeout=10)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_the_published_health_client_can_check_and_watch() -> None:
    health = pytest.importorskip("grpc_health.v1.health_pb2")
    stubs = pytest.importorskip("grpc_health.v1.health_pb2_grpc")
    with running_server() as server, grpc.insecure_channel(server.address) as channel:
        stub = stubs.HealthStub(channel)
        assert stub.Check(health.HealthCheckRequest(), timeout=10).status == health.HealthCheckResponse.SERVING
        watch = stub.Watch(health.HealthCheckRequest(service="model_express.p2p.P2pService"), timeout=20)
        assert next(watch).status == health.HealthCheckResponse.SERVING
        server.close(grace_s=2)
        assert next(watch).status == health.HealthCheckResponse.NOT_SERVING
        with contextlib.suppress(grpc.RpcError):
            next(watch)


def test_without_a_token_nothing_is_said_or_stored(tmp_path: Path) -> None:
    """Defect 14: nobody can redirect clients to other memory without the token."""
    token_file = tmp_path / "tokens"
    token_file.write_text("old-token\nsecret-token\n")
    client_file = tmp_path / "token"
    client_file.write_text("secret-token\n")
    wrong_file = tmp_path / "wrong"
    wrong_file.write_text("secret-tokem\n")
    with running_server(auth_token_file=str(token_file)) as server:
        for environ in ({}, {"MX_AUTH_TOKEN_PATH": str(wrong_file)}):
            with ModelExpressClient(server.address, environ=environ) as client:
                for call in (client.list_sources, lambda: client.publish(make_identity(), "evil", make_worker())):
                    with pytest.raises(ModelExpressError, match="UNAUTHENTICATED: a valid bearer token is required"):
                        call()
        with ModelExpressClient(server.address, environ={"MX_AUTH_TOKEN_PATH": str(client_file)}) as client:
            assert client.list_sources() == []
            client.publish(make_identity(), "w1", make_worker())
            token_file.write_text("rotated\n")
            with pytest.raises(ModelExpressError, match="UNAUTHENTICATED"):
                client.list_sources()
            client_file.write_text("rotated\n")
            assert [ref.worker_id for ref in client.list_sources()] == ["w1"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            fetch(server.http_url + "/fleet.json")
        assert b"w1" in fetch(server.http_url + "/fleet.json", token="rotated")
        assert b"unauthenticated_calls_total 5.0" in fetch(server.http_url + "/metrics")
        with grpc.insecure_channel(server.address) as channel:
            check = client_calls(channel, health_pb2.DESCRIPTOR.services_by_name["Health"])["Check"]
            assert check(health_pb2.HealthCheckRequest(), timeout=10).status == health_pb2.HealthCheckResponse.SERVING


def make_certificate(folder: Path) -> tuple[str, str]:
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    return cert, key


def test_tls(tmp_path: Path) -> None:
    import ssl

    cert, key = make_certificate(tmp_path)
    with running_server(tls_cert=cert, tls_key=key) as server:
        with ModelExpressClient(server.address, environ={"MX_TLS_CA_PATH": cert}) as client:
            client.publish(make_identity(), "w1", make_worker())
            assert len(client.list_sources()) == 1
        plain = ModelExpressClient(server.address, environ={}, timeout_s=5)
        with plain, pytest.raises(ModelExpressError, match=server.address):
            plain.list_sources()
        context = ssl.create_default_context(cafile=cert)
        assert b"w1" in fetch(server.http_url + "/fleet.json", context=context)


def test_files_that_are_no_certificate_are_named(tmp_path: Path) -> None:
    (tmp_path / "junk").write_text("junk")
    junk = str(tmp_path / "junk")
    command = [*MODULE, "--port", "0", "--metrics-port", "0", "--tls-cert", junk, "--tls-key", junk]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "--tls-cert and --tls-key" in result.stderr.splitlines()[-1]


GARBAGE = [b"\x00" * 100_000, b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(50_000)]


@pytest.mark.parametrize("data", [*GARBAGE, os.urandom(1_000_000)], ids=["zeros", "http1", "broken http2", "random"])
def test_garbage_on_the_port_harms_nobody(data: bytes) -> None:
    with running_server() as server, ModelExpressClient(server.address, environ={}) as client:
        client.publish(make_identity(), "w1", make_worker())
        host, port = server.address.split(":")
        for _ in range(5):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5) as connection:
                connection.settimeout(0.2)
                connection.sendall(data)
                connection.recv(1000)
        assert len(client.list_sources(status=READY)) == 1


def test_a_message_that_is_no_protobuf_is_refused() -> None:
    with running_server() as server, grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/model_express.p2p.P2pService/PublishMetadata")
        for data in (b"\xff" * 100, os.urandom(10_000)):
            with pytest.raises(grpc.RpcError):
                call(data, timeout=10)
        with ModelExpressClient(server.address, environ={}) as client:
            assert client.list_sources() == []


def test_a_message_over_the_limit_is_refused_and_the_next_one_is_not() -> None:
    with running_server() as server:
        options = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(server.address, options=options) as channel:
            call = channel.unary_unary("/model_express.p2p.P2pService/PublishMetadata")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"\x00" * (101 * 1024 * 1024), timeout=60)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        with ModelExpressClient(server.address, environ={}) as client:
            assert client.publish(make_identity(), "w1", make_worker())


@pytest.mark.parametrize(("timeout_s", "is_told"), [(20.0, True), (89.0, True), (90.0, False)])
def test_a_timeout_that_leaves_no_time_for_heartbeats_is_told(
    timeout_s: float, is_told: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MX_HEARTBEAT_INTERVAL_SECS", raising=False)
    ModelExpressServer(ServerOptions(heartbeat_timeout=timeout_s))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == is_told
    assert all(f"{timeout_s:g} s leaves time for {timeout_s // 30:g} heartbeats" in line for line in lines)
