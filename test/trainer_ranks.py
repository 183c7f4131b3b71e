"""Trainers of several processes that publish checkpoints as FSDP2 shards them.

As a script it is one rank: it does what the lines of its standard input say, and answers each with a line.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from ramet.trainer import WeightPublisher
from safetensors.torch import load_file
from trainers import free_port


class TrainerProcesses:
    """A trainer of several ranks. Use as a context."""

    def __init__(self, num_ranks: int, metadata: str, model_name: str, folder: Path) -> None:
        port = free_port()
        self.ranks = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(num_ranks), str(port), metadata, model_name, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            )
            for rank in range(num_ranks)
        ]
        self.address = ",".join(self._answers())

    def publish(self, folder: Path, version: str) -> None:
        """Have all ranks publish the weights in a folder, and wait until they have."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps([str(folder), version]) + "\n")
            rank.stdin.flush()
        self._answers()

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
            module.register_parameter(last, torch.nn.Parameter(tensor.clone()))


def sharded(folder: str) -> Tree:
    """The weights in a folder, by FSDP2 over all ranks of the process's group."""
    from torch.distributed.fsdp import fully_shard

    tree = Tree(load_file(Path(folder) / "model.safetensors"))
    fully_shard(tree)
    return tree


def main() -> None:
    import torch.distributed as dist

    rank, num_ranks, port, metadata, model_name, folder = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=int(num_ranks))
    dist.device_mesh.init_device_mesh("cpu", (int(num_ranks),))
    with WeightPublisher(sharded(folder), metadata=metadata, model_name=model_name) as publisher:
        print(publisher.address, flush=True)
        for line in sys.stdin:
            folder, version = json.loads(line)
            publisher.publish(version, sharded(folder))
            print(version, flush=True)


if __name__ == "__main__":
    main()
