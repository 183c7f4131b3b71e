"""Owns the directory of an instance's weights: ranks register here, and clients ask here. Holds no weights itself."""

import hmac
import logging
import re
import threading
from collections.abc import Collection
from email.message import Message
from typing import Any

import msgspec

from ramet.srt.entrypoints.directory_http import POLL_S, DirectoryHandler, DirectoryHTTPServer, error_body
from ramet.srt.utils.http_origin import OriginCheck
from ramet.srt.utils.net import format_url, host_from_here
from ramet.srt.weights.manifest import check_role
from ramet.srt.weights.registration import (
    ASLEEP,
    BEING_CHANGED,
    ControlAddress,
    make_answer,
    parse_registration,
)

logger = logging.getLogger(__name__)


class EngineInfoBootstrapServer:
    """An HTTP server in a thread of the head node, keyed by (model role, world rank). WIRE: see docs/wire.md.

    The port is bound when the object is made, and free again after `close()`.
    """

    handler = DirectoryHandler  # of its requests

    def __init__(
        self,
        host: str,
        port: int,
        *,
        admin_api_key: str | None = None,
        api_key: str | None = None,
        num_ranks: int | None = None,
        allowed_hosts: Collection[str] = (),
    ) -> None:
        """
        Args:
            port: 0 takes a free one; `self.port` says which.
            admin_api_key: the bearer key that registering needs, if any; it is good for asking, too.
            api_key: the bearer key that asking needs, if any; and registering, if there is no `admin_api_key`.
            num_ranks: of the instance, if known: others are refused.
            allowed_hosts: see OriginCheck, which takes the place of keys where there are none.

        Raises:
            OSError: if the address can't be bound; the message names it and the flag.
        """
        self._registering_keys = _keys(admin_api_key or api_key)
        self._asking_keys = _keys(api_key, admin_api_key) if api_key else ()
        self._num_ranks = num_ranks
        self.origins = OriginCheck(host, allowed_hosts)
        self._parsing = threading.Lock()  # what is made of a registration takes several times its memory
        self._answers: dict[tuple[str, int], bytes] = {}
        self._controls: dict[tuple[str, int], ControlAddress | None] = {}
        self._suspended: dict[str, tuple[int, str]] = {}  # roles whose weights can't be had now: status and reason
        self._lock = threading.Lock()
        handler = type("Handler", (self.handler,), {"directory": self})
        try:
            self._http = DirectoryHTTPServer(host, port, handler)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the engine info bootstrap server can't use port {port} of {host} "
                f"(--engine-info-bootstrap-port; 0 takes a free one): {error.strerror}",
            ) from error
        self.host = host
        self.port: int = self._http.server_address[1]
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": POLL_S}, name="engine-info-bootstrap", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it answers, for a caller on this host."""
        return format_url(host_from_here(self.host), self.port)

    def close(self) -> None:
        """Stop answering and free the port. May be called twice."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()

    def get(self, role: str, rank: int) -> dict[str, Any] | None:
        """The answer for a rank, or None if it has not registered."""
        answer = self.get_json(role, rank)
        return None if answer is None else msgspec.json.decode(answer)

    def get_json(self, role: str, rank: int) -> bytes | None:
        """The answer for a rank as JSON text, or None if it has not registered."""
        with self._lock:
            return self._answers.get((role, rank))

    def control_address(self, role: str, rank: int) -> ControlAddress | None:
        """Where a rank takes requests about its weights; None if it has not registered, or takes none."""
        with self._lock:
            return self._controls.get((role, rank))

    def answer(self, rank: str | None, role: str | None = None) -> tuple[int, bytes]:
        """HTTP status and JSON body for the query parameters of a request, here or on the engine's own port."""
        role = role or "target"
        if rank is None or not re.fullmatch(r"[0-9]{1,9}", rank):
            return 400, error_body(f"rank must be a whole number that is not negative; got {rank!r}")
        try:
            check_role(role)
        except ValueError as error:
            return 400, error_body(str(error))
        if (suspended := self.suspension(role)) is not None:
            return suspended[0], error_body(suspended[1])
        found = self.get_json(role, int(rank))
        if found is None:
            return 404, error_body(f"rank {int(rank)} of the {role} model has not registered")
        return 200, found

    def register(self, body: bytes | bytearray) -> None:
        """Store a registration; one of the same role and rank is replaced.

        Raises:
            ValueError: with the reason, if `body` is not a registration.
        """
        with self._parsing:
            registration = parse_registration(body, self._num_ranks)
            answer = make_answer(registration)
        with self._lock:
            self._answers[registration.role, registration.world_rank] = answer
            self._controls[registration.role, registration.world_rank] = registration.control
        logger.debug("rank %d of the %s model has registered", registration.world_rank, registration.role)

    def forget(self, role: str) -> None:
        """Drop what all ranks have registered for a role: nobody shall come for it any more."""
        with self._lock:
            for directory in (self._answers, self._controls):
                for key in [key for key in directory if key[0] == role]:
                    del directory[key]

    def suspend(self, role: str, *, asleep: bool = False) -> None:
        """Send nobody to the weights of a role for now: its ranks change them, one a little later than the other.

        Args:
            asleep: they are put away, and who asks does not wait for them.
        """
        reason = f"the weights of the {role} model {ASLEEP if asleep else BEING_CHANGED}"
        with self._lock:
            self._suspended[role] = 409 if asleep else 503, reason

    def resume(self, role: str) -> None:
        """All ranks have registered what they have now."""
        with self._lock:
            self._suspended.pop(role, None)

    def suspension(self, role: str) -> tuple[int, str] | None:
        """HTTP status and reason for who asks for weights of the role; None if they can be had."""
        with self._lock:
            return self._suspended.get(role)

    def refusal(self, headers: Message, *, registering: bool) -> tuple[int, str] | None:
        """HTTP status and reason if a request with these headers may not ask, or register; None if it may."""
        keys = self._registering_keys if registering else self._asking_keys
        if not keys:
            foreign = self.origins.refusal(headers.get("Host"), headers.get("Origin"), headers.get("Sec-Fetch-Site"))
            return None if foreign is None else (403, foreign)
        given = headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if any([hmac.compare_digest(given, key) for key in keys]):
            return None
        if registering:
            return 401, "registering needs the admin key (--admin-api-key), or --api-key if there is no other"
        return 401, "asking needs the instance's key (--api-key)"


def _keys(*keys: str | None) -> tuple[bytes, ...]:
    return tuple(f"Bearer {key}".encode() for key in keys if key)
