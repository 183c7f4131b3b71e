"""Owns the server that all clients of a run talk to, and its plain answers, which theirs must equal."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from clients.client_run import kept_file
from clients.environments import HERE
from clients.tools_model import write_tools_model
from server_process import MODEL_NAME, ServerProcess

SERVER_FLAGS = ("--device", "cpu", "--dtype", "float32")
FLOW = json.loads((HERE / "flow.json").read_text())


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tools_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(model, log, *SERVER_FLAGS, fake=False) as process:
        yield process.wait_ready()


class PlainAnswers:
    """Texts for the flow's questions, asked with nothing but an HTTP client."""

    def __init__(self, url: str):
        self._url = url
        greedy = {"model": MODEL_NAME, "temperature": 0, "max_tokens": FLOW["max_tokens"]}
        system = {"role": "system", "content": FLOW["system"]}
        asked = [system, {"role": "user", "content": FLOW["question"]}]
        answer = self._ask("/v1/chat/completions", messages=asked, **greedy)
        self.chat: str = answer["choices"][0]["message"]["content"]
        self.usage: dict[str, int] = answer["usage"]
        followed = [{"role": "assistant", "content": self.chat}, {"role": "user", "content": FLOW["follow_up"]}]
        self.sent_back = self._text([*asked, *followed], greedy)
        self.completion: str = self._ask("/v1/completions", prompt=FLOW["prompt"], **greedy)["choices"][0]["text"]

    def _text(self, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
        return self._ask("/v1/chat/completions", messages=messages, **options)["choices"][0]["message"]["content"]

    def _ask(self, route: str, **body: Any) -> dict[str, Any]:
        answer = httpx.post(self._url + route, json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()


@pytest.fixture(scope="session")
def plain(server: ServerProcess) -> PlainAnswers:
    return PlainAnswers(server.url)


_RESULTS: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what became of each client's step: the table in docs/clients.md is made from it."""
    told = dict(report.user_properties)
    if "client" in told and (report.when == "call" or report.failed):
        outcome = "failed" if report.failed else report.outcome
        _RESULTS.setdefault(str(told["client"]), {})[str(told["step"])] = outcome


def pytest_sessionfinish() -> None:
    """Keep the results: a client that ran replaces what was known of it."""
    if _RESULTS:
        file = kept_file("results.json")
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, **_RESULTS}, indent=1))
