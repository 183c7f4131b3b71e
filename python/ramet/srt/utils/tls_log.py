"""Owns what the log says of connections that end before TLS stands: nothing above it ever learns of them."""

import logging
import ssl

logger = logging.getLogger(__name__)

HINTS = {
    "HTTP_REQUEST": "it speaks plain HTTP; this server is reached by https://",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not trust the certificate of --ssl-certfile",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not trust the certificate of --ssl-certfile",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not take the certificate of --ssl-certfile",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it finds the certificate of --ssl-certfile expired",
}


class LoggedHandshake(ssl.SSLObject):
    """One side of TLS, which says in the log why a peer did not come to it."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            raise  # not yet, or a client that has gone: balancers look whether a port is open
        except ssl.SSLError as error:
            logger.info("refused: a connection without TLS: %s", describe(error))
            raise


def describe(error: ssl.SSLError) -> str:
    """Why a handshake failed, as far as its name tells."""
    reason = error.reason or str(error)
    return HINTS.get(reason) or reason.replace("_", " ").lower()


def log_handshakes(context: ssl.SSLContext) -> None:
    """Have a server's failed handshakes in the log."""
    context.sslobject_class = LoggedHandshake
