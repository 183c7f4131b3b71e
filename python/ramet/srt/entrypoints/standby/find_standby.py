"""Owns asking standbys from outside: which there are, and that one of them becomes a model, or none. Blocking calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ramet.srt.weights.pool import PoolState

ASK_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 1 << 20


class NoStandbyError(RuntimeError):
    """No standby can become the model now; the message says why."""


@dataclass(frozen=True)
class Awake:
    """An instance that serves what was asked for."""

    url: str
    served_model_name: str


@dataclass(frozen=True)
class StandbyFinder:
    """Where standbys are.

    Args:
        urls: of standbys; empty: those that the metadata server knows.
        metadata_url: its host:port; None: as the environment says.
        admin_api_key: that /become needs; None: none.
        ca_certs: file with the certificates that https standbys' are verified with; None: the system's.
    """

    urls: Sequence[str]
    metadata_url: str | None = None
    admin_api_key: str | None = None
    ca_certs: str | None = None

    def wake(self, body: Mapping[str, Any], timeout_s: float) -> Awake:
        """Have one become a model that no other needs: those that serve it already or keep it come first.

        Raises:
            NoStandbyError: if none can.
        """
        failures = []
        for url in self._candidates(str(body["model_path"])):
            try:
                answer = self._ask(url, "/become", {**body, "from_standby": True}, timeout_s)
                return Awake(url, str(answer["served_model_name"]))
            except (OSError, ValueError) as error:
                failures.append(f"{url}: {error}")
        raise NoStandbyError("; ".join(failures) or "no standby is known")

    def put_down(self, awake: Awake, timeout_s: float) -> None:
        """Have it be a standby again, if it still serves that. Raises OSError or ValueError if that can't be done."""
        if self.serves(awake):
            self._ask(awake.url, "/become", {"model_path": None}, timeout_s)

    def serves(self, awake: Awake) -> bool:
        """Whether it still does. Raises OSError or ValueError if it does not answer."""
        state = self._ask(awake.url, "/standby", None, ASK_TIMEOUT_S)
        return state.get("state") == "serving" and state.get("served_model_name") == awake.served_model_name

    def _candidates(self, model: str) -> list[str]:
        if self.urls:
            return list(self.urls)
        from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError  # needs grpc

        try:
            with ModelExpressClient(self.metadata_url, timeout_s=ASK_TIMEOUT_S) as client:
                pool = msgspec.json.decode(client.call_fleet("Pool", b"{}"), type=PoolState)
        except (ModelExpressError, ValueError, OSError) as error:
            raise NoStandbyError(str(error)) from None
        free = [one for one in pool.standbys if one.state == "standby"]
        return [one.instance for one in sorted(free, key=lambda one: (model not in one.kept, not one.is_warm))]

    def _ask(self, url: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        """Raises OSError or ValueError if there is no answer, or it is no success."""
        from ramet.srt.utils.http_client import http_request  # imports requests

        headers = {"Content-Type": "application/json"}
        if self.admin_api_key is not None:
            headers["Authorization"] = f"Bearer {self.admin_api_key}"
        status, data = http_request(
            url.rstrip("/") + path,
            "GET" if body is None else "POST",
            timeout_s=timeout_s,
            max_nbytes=MAX_ANSWER_BYTES,
            body=None if body is None else msgspec.json.encode(body),
            headers=headers,
            ca_certs=self.ca_certs,
        )
        try:
            answer = msgspec.json.decode(data, type=dict[str, Any])
        except msgspec.DecodeError:
            raise ValueError(f"answered {status}, and no JSON: is it a standby?") from None
        if status != 200:
            raise ValueError(str((answer.get("error") or {}).get("message") or answer.get("detail") or status))
        return answer
