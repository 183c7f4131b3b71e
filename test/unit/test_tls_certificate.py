"""What is said of certificates: why they can't be used, that their time is over, that they are another host's."""

import asyncio
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils import tls_certificate
from ramet.srt.utils.tls_certificate import Certificate, read_certificate, server_context, watch_certificate
from tls_server import make_certificates

DAY_S = 86400.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """server.pem for 127.0.0.1; encrypted.key, other.key."""
    folder = make_certificates(tmp_path_factory.mktemp("certificates"))

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    openssl("ec", "-in", "server.key", "-aes256", "-passout", "pass:right", "-out", "encrypted.key")
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-out", "other.key")
    return folder


@pytest.mark.parametrize(
    ("key", "password", "reason"),
    [
        ("encrypted.key", None, "the private key is encrypted, and needs --ssl-keyfile-password"),
        ("encrypted.key", "wrong", "the private key is encrypted, and --ssl-keyfile-password is not its password"),
        ("other.key", None, "the key is not the certificate's"),
        ("extensions", None, "one of them has no certificate, or no private key, in PEM"),
        ("no.key", None, "No such file or directory"),
    ],
)
def test_files_that_cannot_be_used_are_refused_with_the_reason(
    folder: Path, key: str, password: str | None, reason: str
) -> None:
    files = {"ssl_certfile": str(folder / "server.pem"), "ssl_keyfile": str(folder / key)}
    with pytest.raises(ValueError) as error:
        ServerArgs(model_path="m", ssl_keyfile_password=password, **files)
    assert str(error.value).endswith(f"can't be used: {reason}")


def test_the_password_opens_the_key(folder: Path) -> None:
    server_context(str(folder / "server.pem"), str(folder / "encrypted.key"), "right")


def test_the_time_of_a_certificate() -> None:
    year, week = Certificate(0.0, 365 * DAY_S), Certificate(0.0, 8 * DAY_S)
    assert year.doubt(350 * DAY_S) is None and week.doubt(5 * DAY_S) is None
    assert "expires on 1971-01-01 00:00 UTC; a new one needs a restart" in (year.doubt(352 * DAY_S) or "")
    assert "expires on 1970-01-09" in (week.doubt(6.5 * DAY_S) or "")
    assert "expired on 1970-01-09" in (week.doubt(8 * DAY_S) or "")
    assert "not valid before 1970-01-01" in (week.doubt(-1.0) or "")


async def watch(
    monkeypatch: pytest.MonkeyPatch, certfile: Path, host: str | None, clock: Callable[[], float] | None = None
) -> None:
    """As a server does, for some of its looks."""
    monkeypatch.setattr(tls_certificate, "CHECK_PERIOD_S", 0.01)
    context = server_context(str(certfile), str(certfile.parent / "server.key"), None)
    clocks = () if clock is None else (clock,)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(watch_certificate(context, str(certfile), host, *clocks), 0.2)


async def test_an_expired_certificate_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await watch(monkeypatch, make_certificates(tmp_path, days=-1) / "server.pem", None)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "the certificate of --ssl-certfile expired on" in record.getMessage()


async def test_one_that_expires_while_it_is_served_is_said_then(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    certfile = folder / "server.pem"
    certificate = read_certificate(server_context(str(certfile), str(folder / "server.key"), None), str(certfile))
    times = iter([certificate.begins, certificate.ends - 60.0, certificate.ends])
    await watch(monkeypatch, certfile, None, lambda: next(times, certificate.ends))
    soon, over = (record.getMessage() for record in caplog.records)
    assert "expires on" in soon and "expired on" in over


@pytest.mark.parametrize(("host", "is_covered"), [("127.0.0.1", True), ("10.0.0.7", False), ("gpu-7.example", False)])
async def test_an_address_that_is_not_in_the_certificate_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, host: str, is_covered: bool
) -> None:
    await watch(monkeypatch, folder / "server.pem", host)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (not is_covered)
    assert is_covered or (f"list this server as {host}" in lines[0] and "certificate is not valid for" in lines[0])
