"""Owns the trainer of bench_trainer.py: two processes that hold a random model in two shards and publish them.

Run as a script it is one rank: it makes its shards where they are to lie, says its address, and publishes at each line
of its input. `TrainerOfTwo` starts both. Measures nothing but the publication, of which the publisher itself says how
long it took.
"""
# ruff: noqa: E402 - the layouts are in the tests' folder, which has to be made importable first

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from bench_common import ROOT
from gpu_model import tensor_shapes

sys.path.insert(0, str(ROOT / "test"))
START_TIMEOUT_S = 120.0
NUM_RANKS = 2


class TrainerOfTwo:
    """The processes. Use as a context manager."""

    def __init__(self, config: dict[str, Any], devices: list[str]) -> None:
        """Raises RuntimeError if a rank does not start."""
        paths = [str(ROOT / "python"), str(ROOT / "test"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        self._ranks = [
            subprocess.Popen(
                [sys.executable, __file__, json.dumps(config), str(rank), device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )
            for rank, device in zip(range(NUM_RANKS), devices, strict=True)
        ]
        try:
            self.addresses = [self._answer(rank)["address"] for rank in self._ranks]
        except BaseException:
            self.__exit__()
            raise

    def publish(self, layout: str, version: str) -> list[dict[str, Any]]:
        """Have both publish; what each says of it: bytes and seconds."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps([layout, version]) + "\n")
            rank.stdin.flush()
        return [self._answer(rank) for rank in self._ranks]

    def _answer(self, rank: "subprocess.Popen[str]") -> dict[str, Any]:
        assert rank.stdout is not None
        killer = threading.Timer(START_TIMEOUT_S, rank.kill)
        killer.start()
        line = rank.stdout.readline()
        killer.cancel()
        if not line:
            raise RuntimeError("a rank of the trainer has ended, or took too long: see above")
        return json.loads(line)

    def __enter__(self) -> "TrainerOfTwo":
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait(30)


def rows(weights: dict[str, Any], rank: int) -> dict[str, Any]:
    """As FSDP2 shards them: each along its first dimension."""
    from ramet.trainer import Slice, Sliced

    found = {}
    for name, tensor in weights.items():
        first, stop = (tensor.shape[0] * part // NUM_RANKS for part in (rank, rank + 1))
        source = ((first, stop), *((0, extent) for extent in tensor.shape[1:]))
        found[name] = Sliced(tensor[first:stop].contiguous(), Slice(name, tuple(tensor.shape), source))
    return found


def serve(config: dict[str, Any], rank: int, device: str) -> None:
    """Be a rank until stdin ends."""
    import published_weights as pw
    import torch
    from ramet.trainer import WeightPublisher

    torch.set_num_threads(1)
    generator = torch.Generator(device).manual_seed(0)  # all ranks make all of it, and keep their part
    held: dict[str, dict[str, Any]] = {"fsdp": {}, "tp": {}}
    for name, shape in tensor_shapes(config).items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02, generator=generator)
        held["fsdp"] |= rows({name: tensor}, rank)
        held["tp"] |= pw.halves({name: tensor}, rank, NUM_RANKS)
        del tensor
    with WeightPublisher(held["fsdp"], model_name=str(Path.cwd())) as publisher:
        print(json.dumps({"address": publisher.address}), flush=True)
        for line in sys.stdin:
            layout, version = json.loads(line)
            done = publisher.publish(version, held[layout])
            print(json.dumps({"bytes": done.num_bytes, "seconds": done.seconds}), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
