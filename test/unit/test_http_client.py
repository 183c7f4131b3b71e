"""One HTTP request to a server that may be slow, hostile, or reached by TLS."""

import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedServer, fetch_seed_answer
from ramet.srt.utils.http_client import http_request
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.errors import WeightTransferError
from tls_server import Talk, make_certificates, server_context, serving

LIMIT = 1 << 20


def read_head(connection: socket.socket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        received = connection.recv(65536)
        if not received:
            break
        head += received
    return head


def say(answer: bytes) -> Talk:
    """Answer every request with these bytes, and end."""

    def talk(connection: socket.socket, _stop: threading.Event) -> None:
        read_head(connection)
        connection.sendall(answer)

    return talk


def drip(answer: bytes, period_s: float = 0.02) -> Talk:
    """Answer byte by byte."""

    def talk(connection: socket.socket, stop: threading.Event) -> None:
        read_head(connection)
        for byte in answer:
            if stop.wait(period_s):
                return
            connection.send(bytes([byte]))

    return talk


def get(port: int, timeout_s: float = 10.0, scheme: str = "http", ca_certs: str | None = None) -> tuple[int, bytes]:
    url = f"{scheme}://127.0.0.1:{port}/path"
    return http_request(url, "GET", timeout_s=timeout_s, max_nbytes=LIMIT, ca_certs=ca_certs)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


def test_a_request_and_its_answer() -> None:
    seen: list[tuple[str, str, bytes, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.command, self.path, body, self.headers["Authorization"]))
            self.send_response(418)
            self.end_headers()
            self.wfile.write(b"short and stout")

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/tea?rank=0&role=draft"
        headers = {"Authorization": "Bearer k"}
        answer = http_request(url, "POST", timeout_s=10, max_nbytes=LIMIT, body=b"{}" * 99, headers=headers)
        server.shutdown()
    assert answer == (418, b"short and stout")
    assert seen == [("POST", "/tea?rank=0&role=draft", b"{}" * 99, "Bearer k")]


@pytest.mark.parametrize(
    "answer",
    [b"H" * 10_000, b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000, b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 10_000],
    ids=["status", "headers", "body"],
)
def test_a_server_that_drips_is_cut_off_at_the_deadline(answer: bytes) -> None:
    start = time.monotonic()
    with serving(drip(answer)) as port, pytest.raises(TimeoutError, match="^no complete answer within 0.3 s$"):
        get(port, timeout_s=0.3)
    assert 0.2 < time.monotonic() - start < 5


def test_a_server_that_never_reads_is_cut_off_while_the_request_is_sent() -> None:
    start = time.monotonic()
    with serving(lambda _, stop: stop.wait(30) and None) as port, pytest.raises(TimeoutError, match="within 0.3 s"):
        http_request(f"http://127.0.0.1:{port}/", "PUT", timeout_s=0.3, max_nbytes=LIMIT, body=bytes(64 << 20))
    assert time.monotonic() - start < 5


def test_too_large_a_body_is_not_read_to_its_end() -> None:
    sent = []

    def talk(connection: socket.socket, stop: threading.Event) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while not stop.is_set():
            sent.append(connection.send(bytes(LIMIT)))

    with serving(talk) as port, pytest.raises(ValueError, match=f"^the answer is longer than {LIMIT} bytes$"):
        get(port)
    assert sum(sent) < 64 * LIMIT


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"220 mail ESMTP\r\n", r"the answer is not HTTP: BadStatusLine\('220 mail ESMTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", "the answer ended 98 bytes early"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nab", "the answer is not HTTP: IncompleteRead"),
    ],
)
def test_what_is_no_whole_answer_is_a_value_error(answer: bytes, reason: str) -> None:
    with serving(say(answer)) as port, pytest.raises(ValueError, match=reason):
        get(port)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\n" + bytes(3 * LIMIT),
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (LIMIT + 1) + bytes(LIMIT + 1),
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
    ],
    ids=["too long", "too long by a byte", "too short"],
)
def test_the_connection_of_a_useless_answer_is_closed_though_the_error_is_kept(answer: bytes) -> None:
    """A loader keeps the errors of all seeds until it has the weights; the connections must not wait for that."""
    is_closed = threading.Event()

    def talk(connection: socket.socket, _stop: threading.Event) -> None:
        read_head(connection)
        connection.settimeout(10)
        try:
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
        except TimeoutError:
            return
        except OSError:  # whichever of these finds it closed
            pass
        is_closed.set()

    with serving(talk) as port:
        with pytest.raises(ValueError) as kept:
            get(port)
        assert is_closed.wait(5), f"{kept.value} has kept it open"


def test_a_compressed_body_is_not_unpacked() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\n"
    with serving(say(head + b"bombs")) as port:
        assert get(port) == (200, b"bombs")


def test_a_refused_connection_keeps_its_type_and_is_one_line() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError) as refusal:
            get(closed.getsockname()[1])
    assert refusal.value.strerror == "Connection refused" and "\n" not in str(refusal.value)


def test_a_connection_that_is_closed_without_an_answer_is_an_os_error() -> None:
    with serving(say(b"")) as port, pytest.raises(ConnectionResetError, match="^Remote end closed connection"):
        get(port)


def test_a_name_that_nobody_has_is_an_os_error() -> None:
    with pytest.raises(socket.gaierror):
        http_request("http://name.invalid:1/", "GET", timeout_s=10, max_nbytes=LIMIT)


def test_a_url_that_is_none_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="Invalid URL"):
        http_request("http://:1/", "GET", timeout_s=10, max_nbytes=LIMIT)


def test_a_redirect_is_an_answer_like_any_other_and_its_body_is_bounded() -> None:
    with serving(say(OK)) as other:
        head = f"HTTP/1.1 307 Elsewhere\r\nLocation: http://127.0.0.1:{other}/\r\n".encode()
        with serving(say(head + b"Content-Length: 4\r\n\r\nhere")) as port:
            assert get(port) == (307, b"here")
        with serving(say(head + b"\r\n" + bytes(2 * LIMIT))) as port, pytest.raises(ValueError, match="longer than"):
            get(port)


def test_nothing_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a proxy nor a password from .netrc."""
    heads: list[bytes] = []

    def talk(connection: socket.socket, _stop: threading.Event) -> None:
        heads.append(read_head(connection))
        connection.sendall(OK)

    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    with socket.socket() as closed, serving(talk) as port:
        closed.bind(("127.0.0.1", 0))
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert get(port) == (200, b"hello")
    (head,) = heads
    assert head.startswith(b"GET /path HTTP/1.1\r\n") and b"authorization" not in head.lower()


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tls(certificates: Path) -> ssl.SSLContext:
    return server_context(certificates)


def test_https_is_verified_with_the_certificates_that_are_given(certificates: Path, tls: ssl.SSLContext) -> None:
    with serving(say(OK), tls) as port:
        assert get(port, scheme="https", ca_certs=str(certificates / "ca.pem")) == (200, b"hello")


def test_https_without_them_is_refused_in_one_line(tls: ssl.SSLContext) -> None:
    with serving(say(OK), tls) as port, pytest.raises(ssl.SSLCertVerificationError) as refusal:
        get(port, scheme="https")
    assert "certificate verify failed" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_certificate_for_another_host_is_refused(certificates: Path, tls: ssl.SSLContext) -> None:
    with serving(say(OK), tls) as port, pytest.raises(ssl.SSLCertVerificationError, match="localhost"):
        http_request(
            f"https://localhost:{port}/",
            "GET",
            timeout_s=10,
            max_nbytes=LIMIT,
            ca_certs=str(certificates / "ca.pem"),
        )


def test_the_system_s_certificates_are_taken_from_where_openssl_looks(
    certificates: Path, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    with serving(say(OK), tls) as port:
        assert get(port, scheme="https") == (200, b"hello")


def test_certificates_for_requests_alone_count_for_nothing(
    certificates: Path, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates / "ca.pem"))
    with serving(say(OK), tls) as port, pytest.raises(ssl.SSLCertVerificationError):
        get(port, scheme="https")


def test_a_file_without_certificates_is_an_os_error(certificates: Path, tls: ssl.SSLContext) -> None:
    with serving(say(OK), tls) as port:
        for name in ("extensions", "absent"):
            with pytest.raises(OSError):
                get(port, scheme="https", ca_certs=str(certificates / name))


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 10_000, b""], ids=["drips", "silent"])
def test_a_deadline_holds_over_tls_too(certificates: Path, tls: ssl.SSLContext, answer: bytes) -> None:
    def talk(connection: socket.socket, stop: threading.Event) -> None:
        drip(answer)(connection, stop)
        stop.wait(30)

    start = time.monotonic()
    with serving(talk, tls) as port, pytest.raises(TimeoutError, match="within 0.3 s"):
        get(port, timeout_s=0.3, scheme="https", ca_certs=str(certificates / "ca.pem"))
    assert time.monotonic() - start < 5


def test_a_handshake_that_never_ends_is_cut_off(certificates: Path) -> None:
    start = time.monotonic()
    with serving(drip(b"\x16\x03\x03\x40\x00" + bytes(10_000))) as port, pytest.raises(TimeoutError):
        get(port, timeout_s=0.3, scheme="https", ca_certs=str(certificates / "ca.pem"))
    assert time.monotonic() - start < 5


def test_a_seed_at_https_is_asked_and_named_so(certificates: Path, tls: ssl.SSLContext) -> None:
    body = b'{"rank": 0, "remote_instance_transfer_engine_info": ["a:1", {}]}'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    with serving(say(head + body), tls) as port:
        address = SeedAddress("127.0.0.1", port, "https")
        trusting = SeedServer(address, ca_certs=str(certificates / "ca.pem"))
        assert fetch_seed_answer(trusting, 0, "target", 10).session_id == "a:1"
        with pytest.raises(WeightTransferError, match=f"of https://127.0.0.1:{port}: .*certificate verify failed"):
            fetch_seed_answer(SeedServer(address), 0, "target", 10)
