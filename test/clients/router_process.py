"""Owns a running sglang-router in front of instances."""

import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
from clients.environments import clean_environment, python_of
from server_process import wait_until

CHECK_INTERVAL_S = 1


class RouterProcess:
    """One router on a free port, as a process of its own."""

    def __init__(self, worker_urls: list[str], policy: str, log: Path):
        port, metrics_port = _free_port(), _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        command: list[Any] = [
            python_of("router"), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", port,
            "--prometheus-port", metrics_port, "--policy", policy, "--worker-urls", *worker_urls,
            "--health-check-interval-secs", CHECK_INTERVAL_S, "--health-failure-threshold", 2,
            "--worker-startup-timeout-secs", 30,
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [str(part) for part in command], stdout=log.open("wb"), stderr=subprocess.STDOUT, env=clean_environment()
        )

    def wait_workers(self, count: int) -> None:
        """Return when so many of its workers are healthy."""

        def healthy() -> bool:
            assert self._process.poll() is None, self._log.read_text(errors="replace")[-2000:]
            try:
                return httpx.get(f"{self.url}/readiness", timeout=5).json().get("healthy_workers") == count
            except (httpx.HTTPError, ValueError):
                return False

        wait_until(healthy, f"{count} healthy workers")

    def post(self, route: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + route, json=body, timeout=60)

    def __enter__(self) -> "RouterProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
