"""Trainers of several processes that publish checkpoints as they shard them, on CPUs or on GPUs.

As a script it is one rank: it does what the lines of its standard input say, and answers each with a line.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import published_weights as pw
import torch
from ramet.trainer import WeightPublisher
from ramet.trainer.tensors import Weights
from safetensors.torch import load_file
from trainers import free_port

TP_SIZE = 2


class TrainerProcesses:
    """A trainer of several ranks. Use as a context.

    Args:
        folder: with the weights that it begins with.
        layout: "fsdp"; "tp fsdp", of two tensor-parallel ranks in each group; or "tp", by slices that it names itself.
        device: "cuda" for one GPU for each rank, as far as there are several.
        prefix: of the commands, to run them on another host.
        options: of each rank's WeightPublisher.
    """

    def __init__(
        self, num_ranks: int, folder: Path, *, layout: str = "fsdp", device: str = "cpu", prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        common = {"folder": str(folder), "layout": layout, "device": device, "size": num_ranks, "port": free_port()}
        paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.ranks = [
            subprocess.Popen(
                [*prefix, sys.executable, __file__, json.dumps(common | {"rank": rank, "options": options})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | paths | (environment or {}),
            )
            for rank in range(num_ranks)
        ]
        self.addresses = self._answers()
        self.address = ",".join(self.addresses)

    def publish(self, folder: Path, version: str, layout: str | None = None) -> list[dict[str, Any]]:
        """Have all ranks publish the weights in a folder, and wait until they have. What each says of it."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps([str(folder), version, layout]) + "\n")
            rank.stdin.flush()
        return [json.loads(answer) for answer in self._answers()]

    def _answers(self) -> list[str]:
        answers = [rank.stdout.readline().strip() for rank in self.ranks if rank.stdout is not None]
        assert all(answers), "a rank of the trainer has ended"
        return answers

    def kill(self, rank: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.ranks[rank].pid, signal.SIGKILL)
        self.ranks[rank].wait()

    def __enter__(self) -> "TrainerProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        for number, rank in enumerate(self.ranks):
            self.kill(number)
            for stream in (rank.stdin, rank.stdout):
                if stream is not None:
                    stream.close()


class Tree(torch.nn.Module):
    """A module with a checkpoint's tensors as its parameters, under their names."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in weights.items():
            module: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, torch.nn.Parameter(tensor))


@functools.cache
def mesh_of(kind: str, sizes: tuple[int, ...], names: tuple[str, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, sizes, mesh_dim_names=names)


def sharded(folder: str, layout: str, rank: int, size: int, device: torch.device) -> Weights:
    """What this rank holds of the weights in a folder."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    weights = {name: one.to(device) for name, one in load_file(Path(folder) / "model.safetensors").items()}
    if layout == "tp":
        return pw.halves(weights, rank, size)
    if layout == "fsdp":
        tree = Tree(weights)
        fully_shard(tree, mesh=mesh_of(device.type, (size,), ("dp",)))
        return tree
    mesh = mesh_of(device.type, (size // TP_SIZE, TP_SIZE), ("dp", "tp"))
    for name, tensor in weights.items():
        if tensor.dim() == 2:
            weights[name] = distribute_tensor(tensor, mesh["tp"], [Shard(int(name.endswith(pw.COLUMNS)))])
    tree = Tree(weights)
    fully_shard(tree, mesh=mesh["dp"])
    return tree


def serve(folder: str, layout: str, device: str, rank: int, size: int, port: int, options: dict[str, Any]) -> None:
    import torch.distributed as dist

    place = torch.device(device)
    if device == "cuda":
        place = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    backend = "nccl" if device == "cuda" and torch.cuda.device_count() >= size else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    with WeightPublisher(sharded(folder, layout, rank, size, place), **options) as publisher:
        print(publisher.address, flush=True)
        for line in sys.stdin:
            folder, version, other = json.loads(line)
            done = publisher.publish(version, sharded(folder, other or layout, rank, size, place))
            print(json.dumps({"version": version, "bytes": done.num_bytes, "seconds": done.seconds}), flush=True)


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
