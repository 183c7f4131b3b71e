"""A real fleet with a target version: waves under load, newcomers, a version that does not verify, the commands."""

import json
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import published_weights as pw
import pytest
from modelexpress_harness import running_server
from published_weights import MODEL, make_models
from safetensors.torch import load_file
from server_process import PYTHON_FOLDER, ServerProcess, wait_until
from updated_servers import GREEDY, SMALL, post

NUM_INSTANCES = 3


class Watched:
    """Requests to all instances that say that they are ready, one after the other, until the end."""

    def __init__(self, servers: list[ServerProcess]) -> None:
        self.servers = servers
        self.failures: list[str] = []
        self.num_ready: list[int] = []
        self.versions: list[set[str]] = [set() for _ in servers]
        self.num_answers = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.is_set():
            ready = [is_ready(server) for server in self.servers]
            self.num_ready.append(sum(ready))
            for number, server in enumerate(self.servers):
                if ready[number]:
                    answer = post(server, "/generate", input_ids=[5, 6, 7], sampling_params=GREEDY)
                    if answer.status_code != 200:
                        self.failures.append(answer.text)
                        continue
                    self.num_answers += 1
                    self.versions[number].add(answer.json()["meta_info"]["weight_version"])

    def end(self) -> None:
        self._ending.set()
        self._thread.join()


def is_ready(server: ServerProcess) -> bool:
    return httpx.get(f"{server.url}/ready", timeout=10).status_code == 200


def version_of(server: ServerProcess) -> str:
    return httpx.get(f"{server.url}/model_info").json()["weight_version"]


def command(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "ramet.cli", "fleet", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(PYTHON_FOLDER)},
    )
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def flags(address: str) -> tuple[str, ...]:
    settings = {"url": address, "model_name": MODEL, "source": True, "wait_timeout": 20}
    return ("--modelexpress-config", json.dumps(settings), "--remote-instance-weight-loader-timeout", "5", *SMALL)


def test_a_fleet_follows_its_target(models: dict[str, Path], tmp_path: Path) -> None:
    weights = load_file(models["new"] / "model.safetensors")
    with running_server() as mx, ExitStack() as stack:

        def start(name: str) -> ServerProcess:
            server = ServerProcess(models["old"], tmp_path / name, *flags(mx.address), fake=False)
            return stack.enter_context(server)

        servers = [start(f"log{number}") for number in range(NUM_INSTANCES)]
        for server in servers:
            server.wait_ready()
            wait_until(lambda server=server: is_ready(server), "an instance to be ready")
        assert "no target" in command("status", "--url", mx.address)
        options = {"metadata": mx.address, "model_name": MODEL}
        publishers = stack.enter_context(pw.published(pw.halves(weights, 0), pw.halves(weights, 1), **options))

        load = Watched(servers)
        said = command("set-version", MODEL, "step-1", "--url", mx.address, "--min-serving", "0.5")
        assert said == f"{MODEL}: target 'step-1', at least 50% serving\n"
        late = start("late")  # it comes in the middle, with the weights of its files
        seen = []

        def all_have_it() -> bool:
            try:
                seen.append(is_ready(late) and version_of(late))
            except httpx.TransportError:
                return False
            return all(is_ready(one) and version_of(one) == "step-1" for one in (*servers, late))

        late.wait_ready()
        wait_until(all_have_it, "all to serve the target", 90)
        load.end()
        assert load.failures == [] and load.num_answers > NUM_INSTANCES and min(load.num_ready) >= 2
        assert all(versions <= {"default", "step-1"} for versions in load.versions)
        assert "default" not in seen  # it was never ready with that
        logs = "".join(server.output for server in servers) + late.output
        assert logs.count("the weights are those of the trainer at") == 1  # the others have them from that instance

        for publisher in publishers:  # what the trainer says of them now is not what they hold
            publisher.publish("step-2")
            ask = publisher._seed.answer
            publisher._server._ask = lambda request, ask=ask: lie(ask(request))
        answer = httpx.post(f"{mx.http_url}/fleet/targets", json={"model": MODEL, "version": "step-2"})
        assert answer.status_code == 200 and answer.json()["previous"] == "step-1", answer.text

        def went_back() -> dict:
            (state,) = httpx.get(f"{mx.http_url}/fleet/targets").json()
            return state if state["target"].get("failed") == "step-2" else {}

        state = wait_until(went_back, "the wave to stop", 60)
        assert state["target"]["version"] == "step-1" and "checksums of" in state["target"]["reason"]
        wait_until(all_have_it, "all to be ready again", 30)
        shown = {f"step-1 ({len(servers) + 1} of {len(servers) + 1}, step-2 failed)"}

        def page_shows_it() -> bool:
            return {one["target"] for one in httpx.get(f"{mx.http_url}/fleet.json").json()["models"]} == shown

        wait_until(page_shows_it, "all to have reported", 30)
        assert "'step-2' failed" in command("status", "--url", mx.address)
        assert f"{MODEL}: no target" in command("clear-version", MODEL, "--url", mx.address)


def lie(reply):
    reply.checksums[0] = "0" * 16
    return reply


def test_what_is_wrong_with_a_target_is_said() -> None:
    with running_server() as mx:
        assert "precondition" not in command("status", "--url", mx.address)
        assert "error: SetTarget at ModelExpress server" in command(
            "set-version", MODEL, "v", "--min-serving", "2", "--url", mx.address
        )
        url = f"{mx.http_url}/fleet/targets"
        assert httpx.post(url, content=b"{}").status_code == 400
        assert httpx.post(url, content=b" " * 70_000).status_code == 413
        assert httpx.post(url, content=b"{}", headers={"Origin": "http://elsewhere"}).status_code == 403
    started = time.monotonic()
    assert "error" in command("status", "--url", "127.0.0.1:1") and time.monotonic() - started < 30
