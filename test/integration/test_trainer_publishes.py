"""A trainer sharded by FSDP2 and real instances of several layouts: what they take, and what a SIGKILL leaves of it."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from modelexpress_harness import free_port
from published_weights import MODEL, make_models
from server_process import PYTHON_FOLDER, ServerProcess, wait_until
from trainer_ranks import TrainerProcesses
from updated_servers import SMALL, post, tokens, versions

LAYOUTS = {"tp 1": (), "tp 2": ("--tp-size", "2"), "fp8": ("--quantization", "fp8")}


class Fleet:
    """A metadata server, an instance of each layout, a trainer of two ranks; each can be killed and started again."""

    def __init__(self, models: dict[str, Path], folder: Path, layouts: dict[str, tuple[str, ...]]) -> None:
        self.models, self.folder, self.layouts = models, folder, layouts
        self.port = free_port()
        self.num_logs = 0
        self.num_versions = 0
        self.metadata = self._start_metadata()
        self.instances = {name: self._start(name) for name in layouts}
        self.trainer = self.start_trainer()
        for server in self.instances.values():
            server.wait_ready()
        self.known = {name: self._known_of_files(name) for name in layouts}

    def _start_metadata(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ramet.modelexpress_server", "--port", str(self.port), "--metrics-port", "0"]
        log = (self.folder / "metadata").open("ab")
        return subprocess.Popen(command, stdout=log, stderr=log, env={"PYTHONPATH": str(PYTHON_FOLDER)})

    def _start(self, name: str) -> ServerProcess:
        self.num_logs += 1
        settings = {"url": f"127.0.0.1:{self.port}", "model_name": MODEL, "source": True, "wait_timeout": 20}
        flags = ("--modelexpress-config", json.dumps(settings), "--remote-instance-weight-loader-timeout", "5")
        log = self.folder / f"log{self.num_logs}"
        return ServerProcess(self.models["old"], log, *flags, *self.layouts[name], *SMALL, fake=False)

    def start_trainer(self) -> TrainerProcesses:
        return TrainerProcesses(2, self.models["old"], metadata=f"127.0.0.1:{self.port}", model_name=MODEL)

    def _known_of_files(self, name: str) -> dict[str, tuple[list[list[str]], list[int]]]:
        """What this instance holds and answers when it loads each checkpoint."""
        server, found = self.instances[name], {}
        for content in ("new", "old"):
            answer = post(server, "/update_weights_from_disk", model_path=str(self.models[content]))
            assert answer.status_code == 200, answer.text
            found[content] = checksums(server), tokens(server)
        return found

    def kill(self, victim: str) -> None:
        if victim == "metadata":
            self.metadata.kill()
            self.metadata.wait()
        elif victim == "trainer":
            for rank in range(len(self.trainer.ranks)):
                self.trainer.kill(rank)
        elif victim.startswith("trainer"):
            self.trainer.kill(int(victim[-1]))
        else:
            self.instances[victim].kill()

    def restore(self, victim: str) -> None:
        if victim == "metadata":
            self.metadata = self._start_metadata()
        elif victim.startswith("trainer"):
            self.trainer.__exit__()
            self.trainer = self.start_trainer()
        else:
            self.instances[victim].close()
            self.instances[victim] = self._start(victim).wait_ready()

    def publish(self, content: str) -> str:
        self.num_versions += 1
        version = f"step-{self.num_versions}"
        self.trainer.publish(self.models[content], version)
        return version

    def take(self, version: str) -> dict[str, httpx.Response | None]:
        """What each instance answers to being told of a version, all at once; None where it died."""

        def tell(server: ServerProcess) -> httpx.Response | None:
            try:
                return post(server, "/update_weights_from_instance", version=version)
            except httpx.TransportError:
                return None

        with ThreadPoolExecutor() as pool:
            return dict(zip(self.instances, pool.map(tell, self.instances.values()), strict=True))

    def content_of(self, name: str) -> str:
        """Which checkpoint an instance serves, by all of its bytes and by what it answers."""
        server = self.instances[name]
        held = checksums(server), tokens(server)
        (content,) = [content for content, known in self.known[name].items() if known == held]
        return content

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.kill, "metadata")
            stack.callback(self.trainer.__exit__)
            for server in self.instances.values():
                stack.callback(server.close)


def checksums(server: ServerProcess) -> list[list[str]]:
    def ask(rank: int) -> httpx.Response:
        return httpx.get(f"{server.url}/remote_instance_transfer_engine_info?rank={rank}")

    first = ask(0).json()["manifest"]
    ranks = range(first["parallel"]["tp_size"])
    return [ask(rank).json()["manifest"]["checksums"]["values"] for rank in ranks]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    fleet = Fleet(make_models(tmp_path_factory.mktemp("models")), tmp_path_factory.mktemp("logs"), LAYOUTS)
    yield fleet
    fleet.close()


def test_all_layouts_take_a_version_at_once_and_each_byte_leaves_the_trainer_about_once(fleet):
    version = fleet.publish("new")
    answers = fleet.take(version)
    for name, answer in answers.items():
        assert answer is not None and answer.status_code == 200, answer
        assert answer.json()["weight_version"] == version and versions(fleet.instances[name])[0] == (version, True)
        assert fleet.content_of(name) == "new"
    # fp8 can't be made of what the others hold, nor the other way round: one of each takes from the trainer.
    takers = {name for name, answer in answers.items() if "of the trainer at" in answer.json()["message"]}
    assert "fp8" in takers and len(takers) == 2
    answer = post(fleet.instances["tp 2"], "/rollback_weights")
    assert answer.status_code == 200 and fleet.content_of("tp 2") == "old"
    answer = post(fleet.instances["tp 2"], "/update_weights_from_instance", address=fleet.trainer.address)
    assert answer.status_code == 200, answer.text
    assert answer.json()["weight_version"] == version and fleet.content_of("tp 2") == "new"


def test_what_can_not_be_taken_is_said(fleet):
    version = fleet.publish("new")
    server = fleet.instances["tp 1"]
    before = fleet.content_of("tp 1")
    half = fleet.trainer.address.split(",")[1]
    for body, words in (
        ({"address": half}, "give the addresses of all its ranks"),
        ({"version": "step-none"}, "lists no ready instance of 'policy' with the version 'step-none', and no trainer"),
        ({"version": version, "weights_digest": "0" * 64}, "has no digest"),
        ({"address": f"{half},{server.url}"}, "some of these are ranks of a trainer, and others are not"),
    ):
        answer = post(server, "/update_weights_from_instance", **body)
        assert answer.status_code == 400 and words in answer.json()["message"], answer.text
    assert fleet.content_of("tp 1") == before


VICTIMS = ("trainer 0", "trainer 1", "metadata", "tp 2", "trainer", "tp 1")
NUM_KILLS = int(os.environ.get("RAMET_KILLS", "2"))


@pytest.mark.parametrize("seed", range(1, 1 + NUM_KILLS))
def test_whoever_is_killed_leaves_whole_versions_and_the_next_reaches_all(fleet, seed):
    chance = random.Random(seed)
    victim = VICTIMS[seed % len(VICTIMS)]
    contents = ["old", "new"] if seed % 2 else ["new", "old"]
    first, second = contents
    assert all(answer.status_code == 200 for answer in fleet.take(fleet.publish(first)).values())
    version = fleet.publish(second)
    killer = threading.Timer(chance.uniform(0.0, 0.4), fleet.kill, [victim])
    killer.start()
    begun = time.monotonic()
    answers = fleet.take(version)
    assert time.monotonic() - begun < 40
    killer.join()
    for name, answer in answers.items():
        if name == victim:
            continue
        assert answer is not None and answer.status_code in (200, 400), answer
        served, _ = versions(fleet.instances[name])[0]
        assert fleet.content_of(name) == (second if answer.status_code == 200 else first)
        assert (served == version) == (answer.status_code == 200)
    fleet.restore(victim)
    last = fleet.publish(first)
    answers = fleet.take(last)
    if victim == "metadata":  # those that live list themselves again by and by
        wait_until(lambda: all(one.status_code == 200 for one in fleet.take(last).values()), "all to have it", 40)
    else:
        assert all(answer.status_code == 200 for answer in answers.values()), [one.text for one in answers.values()]
    assert all(fleet.content_of(name) == first for name in fleet.instances)
