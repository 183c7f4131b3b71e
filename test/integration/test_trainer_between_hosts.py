"""A trainer and four instances, each on its own host: by the transfer engine, and each byte leaves the trainer once.

One instance joins while the others take the version.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fp8_models
import pytest
import sharded_models as sm
from cluster import PYTHON_FOLDER, Host, Network, Node, namespaces_work
from published_weights import MODEL, make_models
from ramet.srt.model_loader.checksums.entries import compute_checksums
from safetensors.torch import load_file
from trainer_ranks import TrainerProcesses
from trainers import free_port
from updated_servers import SMALL

pytestmark = pytest.mark.skipif(not namespaces_work(), reason="needs network namespaces, of root")

SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8,
         "num_hidden_layers": 4}  # fmt: skip
INSTANCES = {"tp 1": {}, "tp 2": {"tp_size": 2}, "pp 2": {"pp_size": 2}, "late": {}}
MOST_TIMES = 1.2  # that a byte leaves the trainer


class Metadata:
    """A metadata server on a host. Use as a context."""

    def __init__(self, host: Host, log: Path) -> None:
        self.address = f"{host.address}:{free_port()}"
        port = self.address.split(":")[1]
        command = [*host.prefix, sys.executable, "-m", "ramet.modelexpress_server", "--host", host.address]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--port", port, "--metrics-port", "0"],
                stdout=output,
                stderr=output,
                env=os.environ | {"PYTHONPATH": str(PYTHON_FOLDER)},
            )

    def __enter__(self) -> "Metadata":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def sent_nbytes(host: Host) -> int:
    """That have left a host over its network."""
    shown = subprocess.run(
        ["ip", "-n", str(host.namespace), "-s", "-j", "link", "show", "eth0"], capture_output=True, check=True
    )
    return json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"]


def start(host: Host, name: str, folder: Path, log: Path, metadata: str) -> Node:
    settings = {"url": metadata, "model_name": MODEL, "source": True, "wait_timeout": 40}
    sizes = [f"--{key.replace('_', '-')}={size}" for key, size in INSTANCES[name].items()]
    flags = ["--model-path", str(folder), "--device", "cpu", "--modelexpress-config", json.dumps(settings)]
    return Node(host, free_port(), log, [*flags, *sizes, *SMALL])


def held_by(node: Node, name: str) -> list[list[str]]:
    """The checksums of each of its ranks."""
    paths = [
        f"/remote_instance_transfer_engine_info?rank={rank}" for rank in range(len(sm.ranks_of(**INSTANCES[name])))
    ]
    return [node.request(path)[1]["manifest"]["checksums"]["values"] for path in paths]


def loaded(folder: Path, name: str) -> list[list[str]]:
    """The same of a load from files."""
    arenas = [fp8_models.load_arena(folder, sm.build_model(folder, one)) for one in sm.ranks_of(**INSTANCES[name])]
    return [list(compute_checksums(arena.manifest, arena).values) for arena in arenas]


def take(node: Node, version: str) -> tuple[int, Any]:
    return node.request("/update_weights_from_instance", {"version": version})


def test_each_byte_leaves_the_trainer_about_once_and_one_that_joins_in_the_middle_has_it_too(tmp_path: Path) -> None:
    pytest.importorskip("mooncake.engine")
    models = make_models(tmp_path / "models", **SHAPE)
    nbytes = sum(one.nbytes for one in load_file(models["new"] / "model.safetensors").values())
    with ExitStack() as stack:
        network = stack.enter_context(Network(1 + len(INSTANCES)))
        home, *others = network.hosts
        hosts = dict(zip(INSTANCES, others, strict=True))
        metadata = stack.enter_context(Metadata(home, tmp_path / "metadata")).address
        trainer = stack.enter_context(
            TrainerProcesses(2, models["old"], layout="tp", prefix=home.prefix, host=home.address, metadata=metadata,
                             model_name=MODEL)
        )  # fmt: skip

        def launch(name: str) -> Node:
            node = start(hosts[name], name, models["old"], tmp_path / name, metadata)
            stack.callback(node.process.wait, 30)
            stack.callback(node.process.kill)
            return node

        nodes = {name: launch(name) for name in INSTANCES if name != "late"}
        for node in nodes.values():
            node.wait_ready()
        trainer.publish(models["new"], "step-1")
        before = sent_nbytes(home)
        with ThreadPoolExecutor(len(nodes)) as pool:
            answers = [pool.submit(take, node, "step-1") for node in nodes.values()]
            nodes["late"] = launch("late")
            assert [one.result()[0] for one in answers] == [200] * 3, [one.result() for one in answers]
        nodes["late"].wait_ready()
        assert held_by(nodes["late"], "late") == loaded(models["old"], "late")  # whole, whatever the others do
        assert take(nodes["late"], "step-1")[0] == 200
        left = sent_nbytes(home) - before
        assert nbytes <= left <= MOST_TIMES * nbytes, f"{left} bytes of {nbytes} have left the trainer's host"
        for name, node in nodes.items():
            assert held_by(node, name) == loaded(models["new"], name), name
        ways = [node.output.count("the weights are those of the trainer at") for node in nodes.values()]
        assert sum(ways) == 1, ways
