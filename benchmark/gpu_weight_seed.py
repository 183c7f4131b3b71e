"""Owns the seed of bench_gpu_weights.py: a process that holds a random model in several topologies, without an engine.

Run as a script it makes the weights where they are to lie, offers them as an instance does, and then sends bare
broadcasts when it is told to. `WeightSeedProcess` starts it. Measures nothing.
"""
# ruff: noqa: E402 - the seed server is in the tests' folder, which has to be made importable first

import json
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_common import ROOT
from ramet.srt.model_loader.arena.allocate import allocate_arena

sys.path.insert(0, str(ROOT / "test"))


class WeightSeedProcess:
    """The process, and the ports of its instances. Use as a context manager."""

    def __init__(self, topologies: dict[str, dict[str, Any]], timeout_s: float) -> None:
        """
        Args:
            topologies: by name: the model's folder, the sizes, and a device for each rank.

        Raises:
            RuntimeError: if it is not ready in time.
        """
        self._topologies = topologies
        answers, answers_end = os.pipe()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "python"), *_python_path()])}
        command = [sys.executable, __file__, json.dumps(topologies), str(answers_end)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[answers_end], env=environment, text=True
        )
        os.close(answers_end)
        self._answers = os.fdopen(answers)
        self._timeout_s = timeout_s
        self.ports: dict[str, int] = {}

    def wait_ready(self) -> None:
        """Raises RuntimeError if it ends, or takes too long."""
        killer = threading.Timer(self._timeout_s, self.process.kill)
        killer.start()
        line = self._answers.readline()
        killer.cancel()
        if not line:
            raise RuntimeError(f"the seed was not ready within {self._timeout_s:g} s, or failed: see above")
        self.ports = json.loads(line)

    def broadcast(self, topology: str, port: int, count: int) -> None:
        """Let it join the group at a port of this host, and send its arena `count` times."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"topology": topology, "port": port, "count": count}) + "\n")
        self.process.stdin.flush()

    def __enter__(self) -> "WeightSeedProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)
        self._answers.close()


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def serve(topologies: dict[str, dict[str, Any]], answers_fd: int) -> None:
    """Be the seed until stdin ends."""
    import sharded_models as sm
    import torch
    from ramet.srt.distributed.pair_group import SENDER, PairGroup, connect
    from ramet.srt.model_loader.loader import DummyModelLoader
    from seed_server import SeedServer

    torch.set_num_threads(1)
    with ExitStack() as stack:
        ports, arenas = {}, {}
        for name, one in topologies.items():
            arenas[name] = []
            for parallel, device in zip(sm.ranks_of(**one["sizes"]), one["devices"], strict=True):
                manifest = sm.make_manifest(sm.build_model(Path(one["folder"]), parallel))
                arena = allocate_arena(manifest, device)
                DummyModelLoader(0).load_weights(manifest, arena, "")
                arenas[name].append(arena)
            ports[name] = stack.enter_context(SeedServer(arenas[name])).port
        with os.fdopen(answers_fd, "w") as answers:
            answers.write(json.dumps(ports) + "\n")
        for line in sys.stdin:
            command = json.loads(line)
            memory = arenas[command["topology"]][0].byte_tensor()
            store = connect("127.0.0.1", command["port"], 30)
            group = PairGroup(store, "bare", SENDER, memory.device, "127.0.0.1", 30)
            for _ in range(command["count"]):
                group.barrier()
                group.broadcast(memory)
            group.close()


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]), int(sys.argv[2]))
