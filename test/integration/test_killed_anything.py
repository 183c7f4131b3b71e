"""SIGKILL while weights change, for whatever has a part in it: ranks, a node, the source, the metadata server.

Afterwards all ranks of both nodes have the old version or all have the new one, or nobody is there any more; and no
answer was a mixture. RAMET_KILLS=50 does it at 50 random moments.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import random_models as rm
from cluster import Case, Cluster, Host, Network, Node
from server_process import is_running, wait_until
from updated_servers import PROMPT, SEED, SMALL

NUM_KILLS = int(os.environ.get("RAMET_KILLS", "2"))
VICTIMS = ("records", "node", "source", "rank")
NUM_TOKENS = 8
LOSS_TIMEOUT_S = 40.0  # for one node to notice that the other is gone
MOST_S = 1.5  # of changes before a kill
SCHEDULER = "ramet.srt.managers.scheduler_process"
SIZES = Case(nnodes=2, tp_size=2)
Values = list[list[str]]  # checksums of all tensors of each rank


class Records:
    """The metadata server."""

    def __init__(self, host: Host, folder: Path):
        self.host, self.folder = host, folder
        self.port = 0
        self.start()

    def start(self) -> None:
        log = self.folder / "records.log"
        command = [*self.host.prefix, sys.executable, "-m", "ramet.modelexpress_server", "--host", self.host.address,
                   "--port", str(self.port), "--metrics-port", "0"]  # fmt: skip
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stderr=file)
        line = wait_until(lambda: [one for one in log.read_text().splitlines() if "gRPC on " in one], "the records")[0]
        self.port = int(line.split("gRPC on ")[1].split(",")[0].rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


class Scene:
    """An instance over two nodes, an instance that has other weights, and a metadata server that knows of both."""

    def __init__(self, folder: Path, hosts: list[Host]):
        self.folder, self.hosts = folder, hosts
        self.models = {
            name: rm.make_model(folder / name, "llama3", seed=seed) for seed, name in enumerate(("old", "new"))
        }
        self.tokens = {name: rm.hf_greedy(path, [PROMPT], NUM_TOKENS)[0] for name, path in self.models.items()}
        self.records = Records(hosts[0], folder)
        self.count = 0
        self.start_source()
        self.start_cluster()
        self.known: dict[str, Values] = {"old": self.checksums()}
        assert self.update()[0] == 200
        self.known["new"] = self.checksums()
        assert self.known["old"] != self.known["new"] and self.change("/rollback_weights", {})[0] == 200

    def _flags(self) -> tuple[str, ...]:
        self.count += 1
        config = json.dumps({"url": f"{self.hosts[0].address}:{self.records.port}", "model_name": "m", "source": True})
        timeout = ("--remote-instance-weight-loader-timeout", "3")
        return (SEED, "--modelexpress-config", config, "--served-model-name", "random", *timeout, *SMALL[:4])

    def start_source(self) -> None:
        flags = self._flags()
        log = self.folder / f"source-{self.count}.log"
        port = 31000 + self.count
        words = ["--model-path", str(self.models["new"]), "--engine-info-bootstrap-port", "0", *flags]
        self.source = Node(self.hosts[0], port, log, words)
        self.source.wait_ready()

    def start_cluster(self) -> None:
        flags = self._flags()
        folder = self.folder / f"nodes-{self.count}"
        folder.mkdir()
        self.cluster = Cluster(SIZES, self.hosts, self.models["old"], folder, *flags)
        self.cluster.wait_ready()

    @property
    def head(self) -> Node:
        return self.cluster.head

    def change(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        try:
            return self.head.request(path, body, timeout_s=90)
        except (OSError, ValueError):  # an answer that breaks off
            return 0, None

    def update(self) -> tuple[int, Any]:
        address = f"{self.hosts[0].address}:{self.source.port}"
        return self.change("/update_weights_from_instance", {"address": address, "weight_version": "new"})

    def checksums(self) -> Values:
        """Of what is in the memory of each rank now."""
        status, answer = self.change("/weights_checker", {})
        assert status == 200, answer
        return [list(rank["checksums"].values()) for rank in answer["ranks"]]

    def end(self) -> None:
        for name in ("cluster", "source"):
            if (one := getattr(self, name, None)) is not None:
                one.close()
        self.records.kill()


class Changes:
    """Forth and back, and requests beside it, until one of them is not answered any more."""

    def __init__(self, scene: Scene):
        self.scene = scene
        self.ending = threading.Event()
        self.mixed: list[Any] = []
        self.num_answers = 0
        self.threads = [threading.Thread(target=work) for work in (self._change, self._ask)]
        for thread in self.threads:
            thread.start()

    def _change(self) -> None:
        while not self.ending.is_set():
            for status, _ in (self.scene.update(), self.scene.change("/rollback_weights", {})):
                if status == 0:
                    return

    def _ask(self) -> None:
        params = {"max_new_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        while not self.ending.is_set():
            status, said = self.scene.change("/generate", {"input_ids": PROMPT, "sampling_params": params})
            if status != 200:
                return
            self.num_answers += 1
            spans = said["meta_info"]["weight_versions"]
            name = "new" if spans[0]["version"] == "new" else "old"
            end = spans[0]["end"]
            if said["output_ids"][:end] != self.scene.tokens[name][:end]:
                self.mixed.append(said)

    def end(self) -> None:
        self.ending.set()
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()
        assert not self.mixed, self.mixed[0]


def ranks_of(node: Node) -> list[int]:
    return [pid for pid in node.descendants() if SCHEDULER in Path(f"/proc/{pid}/cmdline").read_text()]


def kill_one(scene: Scene, victim: str, random_: random.Random) -> None:
    """At a random moment of changes; afterwards everything is there again, with the old weights."""
    nodes = scene.cluster.nodes
    everyone = [pid for node in nodes for pid in [node.process.pid, *node.descendants()]]
    changes = Changes(scene)
    time.sleep(random_.uniform(0.0, MOST_S))
    try:
        if victim == "records":
            scene.records.kill()
        elif victim == "source":
            scene.source.kill()
        elif victim == "node":
            nodes[1].kill()
        else:
            os.kill(random_.choice(ranks_of(random_.choice(nodes))), signal.SIGKILL)
        if victim in ("node", "rank"):
            assert scene.head.process.wait(LOSS_TIMEOUT_S) not in (0, None)
    finally:
        changes.end()
    if victim in ("node", "rank"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            nodes[1].process.wait(LOSS_TIMEOUT_S)
        wait_until(lambda: not any(is_running(pid) for pid in everyone), "the end of both nodes", LOSS_TIMEOUT_S)
        scene.cluster.close()
        scene.start_cluster()
    else:
        name = "new" if scene.head.request("/model_info")[1]["weight_version"] == "new" else "old"
        assert scene.checksums() == scene.known[name], f"{victim}: not {name} everywhere"
        assert scene.head.generate(PROMPT, NUM_TOKENS) == scene.tokens[name]
        if victim == "source":
            scene.start_source()
        else:
            scene.records.start()
        if name == "new":
            assert scene.change("/update_weights_from_disk", {"model_path": str(scene.models["old"])})[0] == 200
    assert scene.checksums() == scene.known["old"]
    status, answer = scene.update()
    assert status == 200 and scene.checksums() == scene.known["new"], answer
    assert scene.change("/rollback_weights", {})[0] == 200


@pytest.mark.timeout(60 + 120 * NUM_KILLS)
def test_whatever_is_killed_leaves_one_version_everywhere(tmp_path: Path) -> None:
    random_ = random.Random(14)
    with Network(2) as network:
        scene = Scene(tmp_path, network.hosts)
        try:
            for number in range(NUM_KILLS):
                kill_one(scene, VICTIMS[number % len(VICTIMS)], random_)
                print(f"kill {number}: {VICTIMS[number % len(VICTIMS)]}", flush=True)
        finally:
            scene.end()
