"""Owns what tests need of TLS: certificates that a CA of their own has signed, and TLS in front of a server."""

import base64
import contextlib
import hashlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


def make_certificates(folder: Path, days: int = 2) -> Path:
    """Write ca.pem, and server.pem with server.key for 127.0.0.1, which it has signed. Returns `folder`.

    Args:
        days: for which the server's is valid; below 0 its time is over.
    """

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test CA",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip
    openssl("req", *new_key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=seed")
    (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n")
    openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", str(days), "-extfile", "extensions", "-out", "server.pem")  # fmt: skip
    return folder


def server_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context


def key_digest(folder: Path) -> str:
    """Of the server's public key, as browsers take it that shall trust that one: SHA-256 in base64."""
    command = ["openssl", "pkey", "-in", "server.key", "-pubout", "-outform", "DER"]
    key = subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60).stdout
    return base64.b64encode(hashlib.sha256(key).digest()).decode()


def trust(folder: Path) -> ssl.SSLContext:
    """For clients of that server."""
    return ssl.create_default_context(cafile=folder / "ca.pem")


Talk = Callable[[socket.socket, threading.Event], None]


@contextlib.contextmanager
def serving(talk: Talk, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """A port on loopback; `talk` has each connection, by TLS with `context`, and an event that says that it is over."""
    stop = threading.Event()

    def handle(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
            with connection:
                talk(connection, stop)

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)

        def serve() -> None:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    threading.Thread(target=handle, args=(server.accept()[0],), daemon=True).start()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            stop.set()
            thread.join(10)


def tls_in_front_of(port: int, context: ssl.SSLContext) -> contextlib.AbstractContextManager[int]:
    """Another port on loopback, at which the server of `port` is reached by TLS."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            with source.makefile("rb", buffering=0) as stream, target.makefile("wb", buffering=0) as sink:
                shutil.copyfileobj(stream, sink)
            target.shutdown(socket.SHUT_WR)

    def talk(outer: socket.socket, _stop: threading.Event) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as inner:
            threading.Thread(target=pump, args=(outer, inner), daemon=True).start()
            pump(inner, outer)

    return serving(talk, context)
