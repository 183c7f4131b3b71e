"""Owns waiting for the store of a trainer, which begins to listen when it likes."""

import socket
import time
from collections.abc import Callable

from ramet.srt.distributed.receiver_messages import Place

CONNECT_PERIOD_S = 0.1
CONNECT_TIMEOUT_S = 2.0


def wait_for_listener(place: Place, deadline: float, is_over: Callable[[], bool] = lambda: False) -> None:
    """Return when the trainer listens. torch's store waits too, but fills the log meanwhile.

    Args:
        deadline: by time.monotonic().
        is_over: whether nobody waits for it any more.

    Raises:
        OSError: if it does not in time, or there is no such host.
    """
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=CONNECT_TIMEOUT_S).close()
            return
        except socket.gaierror as error:
            raise OSError(f"{place.host} is no host: {error.strerror}") from None
        except OSError as error:
            if time.monotonic() > deadline or is_over():
                raise OSError(
                    f"no trainer has listened at {place.address} within {place.timeout_s:g} s: {error}"
                ) from None
        time.sleep(CONNECT_PERIOD_S)
