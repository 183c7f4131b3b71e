"""Owns what can be told of a server's certificate, at its start and later: can it be used, until when, for whom?

The standard library shows a certificate only to who has verified it, so that a client and a server meet in memory here.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

logger = logging.getLogger(__name__)

SOON_S = 14 * 86400.0  # before its end, or a quarter of its time if that is less
CHECK_PERIOD_S = 3600.0
NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, which Python has no name for
MAX_FLIGHTS = 10
OTHER_KEY = "KEY_VALUES_MISMATCH"
_REASONS = {
    "": "one of them has no certificate, or no private key, in PEM",
    "NO_START_LINE": "one of them has no certificate, or no private key, in PEM",
    OTHER_KEY: "the key is not the certificate's",
}


def server_context(certfile: str, keyfile: str | None, password: str | None) -> ssl.SSLContext:
    """What serves a certificate. Nobody is asked for a password.

    Raises:
        ValueError: if the files can't be used; the message says why.
    """
    is_encrypted = False

    def give_password() -> str:
        nonlocal is_encrypted
        is_encrypted = True
        return password or ""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certfile, keyfile, give_password)
    except OSError as error:
        if is_encrypted and getattr(error, "reason", None) != OTHER_KEY:
            reason = "the private key is encrypted, and " + (
                "--ssl-keyfile-password is not its password" if password else "needs --ssl-keyfile-password"
            )
        elif isinstance(error, ssl.SSLError):
            reason = _REASONS.get(error.reason or "", str(error.reason or error).replace("_", " ").lower())
        else:
            reason = error.strerror or str(error)
        files = f"{certfile} and {keyfile or 'the key in it'}"
        raise ValueError(f"--ssl-certfile and --ssl-keyfile: {files} can't be used: {reason}") from None
    return context


class Certificate(NamedTuple):
    """From when on to when it is valid, in unix seconds."""

    begins: float
    ends: float

    def doubt(self, now: float) -> str | None:
        """What is wrong with it now, or is going to be soon."""
        if now >= self.ends:
            return f"the certificate of --ssl-certfile expired on {_date(self.ends)}: clients that verify it refuse it"
        if now < self.begins:
            return f"the certificate of --ssl-certfile is not valid before {_date(self.begins)}"
        if self.ends - now < min(SOON_S, (self.ends - self.begins) / 4):
            return f"the certificate of --ssl-certfile expires on {_date(self.ends)}; a new one needs a restart"
        return None


def read_certificate(context: ssl.SSLContext, certfile: str) -> Certificate:
    """The certificate that `context` serves. Raises ssl.SSLError if clients refuse it whatever the time is."""
    facts = _meet(context, certfile, None).getpeercert()
    assert facts
    return Certificate(*(ssl.cert_time_to_seconds(str(facts[name])) for name in ("notBefore", "notAfter")))


def name_doubt(context: ssl.SSLContext, certfile: str, host: str) -> str | None:
    """Why a client that calls the server by this name or address does not trust it; None if it does."""
    try:
        _meet(context, certfile, host)
    except ssl.SSLCertVerificationError as error:
        return error.verify_message.rstrip(".")
    return None


def _meet(context: ssl.SSLContext, certfile: str, host: str | None) -> ssl.SSLObject:
    """A client's side of a connection to the server; it trusts this certificate, at any time.

    Raises:
        ssl.SSLError: if it does not, for another reason.
    """
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = host is not None
    client_context.load_verify_locations(certfile)
    client_context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(back, there, server_hostname=host)
    server = context.wrap_bio(there, back, server_side=True)
    for _ in range(MAX_FLIGHTS):
        waiting = 0
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                waiting += 1
        if not waiting:
            break
    return client


async def watch_certificate(
    context: ssl.SSLContext, certfile: str, host: str | None, clock: Callable[[], float] = time.time
) -> None:
    """Say in the log what is wrong with a certificate, now and whenever that changes, until the task is cancelled.

    Args:
        host: by which other instances are told to call the server; None if they aren't.
    """
    try:
        certificate = read_certificate(context, certfile)
        reason = None if host is None else name_doubt(context, certfile, host)
    except ssl.SSLError as error:
        logger.warning("clients that verify the certificate of --ssl-certfile refuse it: %s", _words(error))
        return
    if reason is not None:
        logger.warning("metadata servers list this server as %s, and clones that verify its certificate refuse it: %s",
                       host, reason)  # fmt: skip
    said: str | None = None
    while True:
        if (doubt := certificate.doubt(clock())) != said and doubt is not None:
            logger.warning("%s", doubt)
        said = doubt
        await asyncio.sleep(CHECK_PERIOD_S)


def _words(error: ssl.SSLError) -> str:
    return getattr(error, "verify_message", None) or str(error.reason or error).replace("_", " ").lower()


def _date(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
