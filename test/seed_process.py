"""Owns a seed as a process of its own: an arena filled with numbers, a WeightSeed, and an instance's HTTP routes.

It imports no torch, so that it starts at once. Run as a script it serves until its stdin ends; `SeedProcess`
starts it from a test.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import numpy as np
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.entrypoints.engine_info_bootstrap_server import EngineInfoBootstrapServer
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.seed.weight_seed import WeightSeed
from ramet.srt.utils.key_proof import is_proof
from ramet.srt.weights.manifest import WeightBox, WeightManifest, build_weight_manifest

DEFAULTS: dict[str, Any] = {
    "host": "127.0.0.1",
    "shapes": {"a": [3, 7], "b": [1000, 64], "c": [0, 4], "d": [5]},
    "dtype": "float32",
    "fill": 1,  # seed of the numbers; another one is another model of the same layout
    "fields": {},  # of the manifest
    "without_manifest": False,  # as an upstream seed
    "started_at": 0.0,
    "is_loading": False,  # answer as an instance that is not up yet
    "api_key": None,  # that every call must show
    "lie": False,  # change the weights after their checksums are computed
}


def make_manifest(config: dict[str, Any]) -> WeightManifest:
    """Each tensor is one whole checkpoint tensor of the same name."""
    parameters = []
    for name, shape in config["shapes"].items():
        whole = tuple((0, extent) for extent in shape)
        boxes = (WeightBox(name, whole, whole),)
        parameters.append((name, SimpleNamespace(shape=tuple(shape), dtype=config["dtype"], boxes=boxes)))
    fields = {"model_name": "toy", "revision": "", "quantization": "", "role": "target"}
    return build_weight_manifest(
        parameters, dtype=config["dtype"], parallel=ParallelConfig(), **(fields | config["fields"])
    )


def make_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The numbers in each tensor, as raw bytes: quick to make, different everywhere and for every `fill`."""
    tensors = {}
    for i, entry in enumerate(make_manifest(config).entries):
        words = np.arange(-(-entry.nbytes // 4), dtype=np.uint32)
        words *= np.uint32(2654435761)
        words += np.uint32(config["fill"] * 1000003 + i)
        tensors[entry.name] = words.view(np.uint8)[: entry.nbytes] & 0x3F  # finite in every floating-point type
    return tensors


def fill_arena(arena: WeightArena, tensors: dict[str, np.ndarray]) -> None:
    for entry in arena.manifest.entries:
        arena.memory[entry.offset : entry.offset + entry.nbytes] = tensors[entry.name].data


def holds(arena: WeightArena, tensors: dict[str, np.ndarray]) -> bool:
    """Whether the arena has exactly these numbers."""
    memory = np.frombuffer(arena.memory, np.uint8)
    return all(
        np.array_equal(memory[entry.offset : entry.offset + entry.nbytes], tensors[entry.name])
        for entry in arena.manifest.entries
    )


def serve(config: dict[str, Any]) -> None:
    """Be a seed until stdin ends. Prints its HTTP port when it is ready."""
    manifest = make_manifest(config)
    arena = allocate_arena(manifest, "cpu")
    fill_arena(arena, make_tensors(config))
    seed = WeightSeed.start(manifest, arena, host=config["host"], started_at=config["started_at"])
    if config["lie"]:
        arena.memory[manifest.entries[1].offset] ^= 1
    bootstrap = EngineInfoBootstrapServer(config["host"], 0)
    seed.register(bootstrap.url, admin_api_key=None, timeout_s=10)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if config["api_key"] and not self._has_key(config["api_key"]):
                status, body = 401, b"{}"
            elif config["is_loading"]:
                status, body = 503, b"{}"
            elif config["without_manifest"] and not url.path.startswith("/get_remote"):
                status, body = 404, b"{}"
            else:
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                status, body = bootstrap.answer(query.get("rank"), query.get("role"))
            if config["without_manifest"] and status == 200:
                kept = ("rank", "remote_instance_transfer_engine_info")
                body = json.dumps({k: v for k, v in json.loads(body).items() if k in kept}).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def _has_key(self, key: str) -> bool:
            given = self.headers["Authorization"] or ""
            authority = f"{config['host']}:{self.server.server_address[1]}"
            return given == f"Bearer {key}" or is_proof(given, key, self.command, [authority], self.path)

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer((config["host"], 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    sys.stdout.write(f"{http.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()
    seed.close()
    bootstrap.close()


class ChildSeed:
    """A script that prints its HTTP port and is a seed until its stdin ends. Use as a context manager."""

    def __init__(self, script: str, *arguments: str, prefix: Sequence[str] = ()) -> None:
        """
        Args:
            prefix: a command that starts it, for example elsewhere.
        """
        self.process = subprocess.Popen(
            [*prefix, sys.executable, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the seed process ended with {self.process.wait(30)}"
        self.port = int(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def pause(self) -> None:
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal_all(signal.SIGCONT)

    @property
    def children(self) -> list[int]:
        """Its own processes: those that serve its weights over the network."""
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        return [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]

    def _signal_all(self, number: int) -> None:
        for pid in (self.process.pid, *self.children):
            os.kill(pid, number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(30)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class SeedProcess(ChildSeed):
    """A seed of numbers, with `config` over DEFAULTS."""

    def __init__(self, prefix: Sequence[str] = (), **config: Any) -> None:
        self.config = DEFAULTS | config
        super().__init__(__file__, json.dumps(self.config), prefix=prefix)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
