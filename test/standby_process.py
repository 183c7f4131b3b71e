"""Starts standbys as processes of their own for tests, and has them become models."""

from pathlib import Path
from typing import Any

import httpx
from server_process import ServerProcess, wait_until


class StandbyProcess(ServerProcess):
    """One standby on a free port."""

    def __init__(self, log: Path, *flags: str, **environment: str):
        port = [] if "--port" in flags else ["--port", "0"]
        self._start(["-m", "ramet.cli", "standby", "--device", "cpu", *port, *flags], log, True, environment)

    def wait_warm(self) -> "StandbyProcess":
        """Return when processes wait for a model."""
        url = self.url
        wait_until(lambda: self._ended() or self.state_at(url).get("is_warm"), "a spare", 120)
        return self

    def state_at(self, url: str) -> dict[str, Any]:
        """What /standby answers there, nothing if nobody does."""
        try:
            return httpx.get(f"{url}/standby", timeout=10).json()
        except httpx.HTTPError:
            return {}

    @property
    def state(self) -> dict[str, Any]:
        return self.state_at(self.url)

    def ask(self, model: Path | None, **body: Any) -> httpx.Response:
        """The answer to /become."""
        body = {"model_path": None if model is None else str(model), **body}
        return httpx.post(f"{self.url}/become", json=body, timeout=120)

    def become(self, model: Path | None, **body: Any) -> dict[str, Any]:
        """What a success answers."""
        answer = self.ask(model, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()


def newest(pids: list[int]) -> int:
    """The process that was started last."""

    def started(pid: int) -> int:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rsplit(")", 1)[1].split()[19])

    return max(pids, key=started)


class ParkProcess(ServerProcess):
    """One parked model's port."""

    def __init__(self, model: Path, log: Path, *flags: str):
        arguments = ["-m", "ramet.cli", "park", str(model), "--port", "0", "--wake-timeout", "5", *flags]
        self._start(arguments, log, True, {})
