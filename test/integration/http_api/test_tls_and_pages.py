"""A server by https in a real browser: pages of the origins that are named use its API, those of others can't."""

import json
import socket
import ssl
from pathlib import Path

from browser import open_browser
from server_process import ServerProcess, wait_until
from tls_server import key_digest, make_certificates, trust

ASK = """fetch(%s, {method: "POST", headers: {"Content-Type": "application/json", "Authorization": "Bearer secret"},
    body: JSON.stringify({prompt: "a", max_tokens: 3, stream: %s})}).then(
        async (answer) => [answer.status, answer.headers.get("x-request-id"), await answer.text()],
        () => "refused")"""


async def test_pages_of_named_origins_call_by_https(model: str, server: ServerProcess, tmp_path: Path) -> None:
    folder = make_certificates(tmp_path)
    flags = ("--ssl-certfile", str(folder / "server.pem"), "--ssl-keyfile", str(folder / "server.key"), "--api-key",
             "secret", "--cors-allow-origins", "https://ui.example", server.url)  # fmt: skip
    with ServerProcess(Path(model), tmp_path / "log", *flags, verify=trust(folder)) as secure:
        secure.wait_ready()
        assert secure.url.startswith("https://127.0.0.1:")
        url = json.dumps(f"{secure.url}/v1/completions")
        trusted = f"--ignore-certificate-errors-spki-list={key_digest(folder)}"
        async with open_browser(tmp_path / "profile", trusted) as tab:
            await tab.open(f"{server.url}/health")  # a page without a policy of its own
            status, request_id, text = await tab.evaluate(ASK % (url, "false"))
            assert (status, json.loads(text)["object"]) == (200, "text_completion") and request_id
            status, request_id, text = await tab.evaluate(ASK % (url, "true"))
            assert status == 200 and request_id and text.endswith("data: [DONE]\n\n")
            await tab.open(f"{server.url.replace('127.0.0.1', 'localhost')}/health")  # another origin
            assert await tab.evaluate(ASK % (url, "false")) == "refused"
            await tab.open(f"{secure.url}/docs")
            await tab.wait_for("document.getElementById('message').textContent.includes('Authorization')")
        assert_old_clients_are_told(secure)


def test_an_expired_certificate_is_said_at_the_start(model: str, tmp_path: Path) -> None:
    folder = make_certificates(tmp_path, days=-1)
    flags = ("--ssl-certfile", str(folder / "server.pem"), "--ssl-keyfile", str(folder / "server.key"))
    with ServerProcess(Path(model), tmp_path / "log", *flags) as secure:
        line = "WARNING the certificate of --ssl-certfile expired on"
        wait_until(lambda: line in secure.output, "the line about the certificate")


def assert_old_clients_are_told(secure: ServerProcess) -> None:
    """Who speaks no TLS, or trusts nobody, gets no answer; the log says why, and the server goes on."""
    port = int(secure.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"HTTP/1.1" not in plain.recv(1000)
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            ssl.create_default_context().wrap_socket(plain, server_hostname="127.0.0.1"),
        ):
            raise AssertionError("a certificate of nobody's was taken")
    except ssl.SSLCertVerificationError:
        pass
    with socket.create_connection(("127.0.0.1", port), timeout=10):
        pass  # a balancer that looks whether the port is open: no line
    reasons = ("it speaks plain HTTP; this server is reached by https://",
               "it does not trust the certificate of --ssl-certfile")  # fmt: skip
    lines = [f"INFO refused: a connection without TLS: {reason}" for reason in reasons]
    wait_until(lambda: all(line in secure.output for line in lines), "the lines about both", 10)
    assert secure.output.count("a connection without TLS") == 2
    assert secure.status(f"{secure.url}/health") == 200
