"""Transfers between ranks over a network transport, beside the transport alone: topologies, tensors, seeds, broadcasts.

    python benchmark/bench_transfers.py [--rounds 5] [--layers 12]

Seed processes hold a random model in several topologies; this process is one rank of a client. Every round measures
everything once, one after the other; ratios are medians of the rounds' ratios of GB/s of what the rank needs. The bare
transports fill equally fresh memory: Mooncake reads 64 MiB at a time, gloo broadcasts everything at once.
"""
# ruff: noqa: E402 - the seed server is in the tests' folder, which has to be made importable first

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from bench_common import ROOT, report, timed

sys.path.insert(0, str(ROOT / "test"))

import psutil
import seed_process
import sharded_models as sm
import torch
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.distributed.pair_group import RECEIVER, PairGroup, listen, open_store
from ramet.srt.model_loader.arena.host import HostWeightArena
from ramet.srt.model_loader.client.open_sources import SeedSources
from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.model_loader.client.transfer import SeedTransfer
from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedServer, fetch_seed_answer
from ramet.srt.model_loader.transport.engine_messages import StartEngine
from ramet.srt.model_loader.transport.mooncake_engine import MooncakeEngine
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.manifest import WeightManifest
from seed_server import SeedServerProcess, write_random_model

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
}
LOOP_BYTES = 64 << 20
TIMEOUT_S = 60.0
BARE_SENDER = """
import sys, torch
from ramet.srt.distributed.pair_group import SENDER, PairGroup, connect
memory = torch.ones(int(sys.argv[2]), dtype=torch.uint8)
group = PairGroup(connect("127.0.0.1", int(sys.argv[1]), 60), "bare", SENDER, memory.device, "127.0.0.1", 60)
for _ in range(int(sys.argv[3])):
    group.barrier()
    group.broadcast(memory)
"""


@functools.cache
def _bare_engine() -> Any:
    """Mooncake's own engine in this process."""
    return MooncakeEngine(StartEngine("127.0.0.1", "127.0.0.1", "tcp", ""))._engine


class Bench:
    """The seeds, and one method per measurement; each returns bytes per second of what the rank needs."""

    def __init__(self, folder: Path, stack: ExitStack, num_transfers: int) -> None:
        self.folder = folder
        sizes = {"tp1": {}, "other tp1": {}, "tp2": {"tp_size": 2}, "tp4": {"tp_size": 4}}
        self.seeds = {name: stack.enter_context(SeedServerProcess(folder, one)) for name, one in sizes.items()}
        self.whole = self.manifest()
        answer = fetch_seed_answer(SeedServer(SeedAddress("127.0.0.1", self.seeds["tp1"].port)), 0, "target", TIMEOUT_S)
        self.session, self.base = answer.session_id, answer.arena_address
        # The same bytes in few tensors and in many.
        nbytes = self.whole.arena_nbytes // 4
        self.many = {
            count: stack.enter_context(
                seed_process.SeedProcess(shapes={f"w{i}": [nbytes // count] for i in range(count)})
            )
            for count in (16, 4096)
        }
        self._listen_for_bare_broadcasts(stack, num_transfers)

    def manifest(self, rank: int = 0, **sizes: int) -> WeightManifest:
        return sm.make_manifest(sm.build_model(self.folder, sm.ranks_of(**sizes)[rank]))

    def _listen_for_bare_broadcasts(self, stack: ExitStack, count: int) -> None:
        store = open_store(listen("127.0.0.1", 0), "127.0.0.1", TIMEOUT_S)
        arguments = [str(store.port), str(self.whole.arena_nbytes), str(count)]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
        sender = subprocess.Popen([sys.executable, "-c", BARE_SENDER, *arguments], env=environment)
        stack.callback(sender.wait, 30)
        stack.callback(sender.kill)
        self.bare_group = PairGroup(store, "bare", RECEIVER, torch.device("cpu"), "127.0.0.1", TIMEOUT_S)

    def transfer(self, manifest: WeightManifest, *ports: int, **options: Any) -> float:
        """A load's transfer, without the checksums afterwards."""
        arena = HostWeightArena(manifest)
        config = LoadConfig(local_mode="off", timeout_s=TIMEOUT_S, **options)
        seeds = [SeedInstance(SeedAddress("127.0.0.1", port), config, manifest) for port in ports]
        for seed in seeds:
            seed.find_ranks()
        seconds = timed(SeedTransfer(arena, seeds, lambda: SeedSources(arena, config)).run)
        return manifest.payload_nbytes / seconds

    def bare_reads(self) -> float:
        """batch_transfer_sync_read in a loop, registration included."""
        engine = _bare_engine()
        target = HostWeightArena(self.whole)
        assert self.base is not None
        base: int = self.base

        def loop() -> None:
            assert engine.register_memory(target.address, target.nbytes) == 0
            for start in range(0, self.whole.arena_nbytes, LOOP_BYTES):
                length = min(LOOP_BYTES, self.whole.arena_nbytes - start)
                addresses = [target.address + start], [base + start]
                assert engine.batch_transfer_sync_read(self.session, *addresses, [length]) == 0
            engine.unregister_memory(target.address)

        return self.whole.payload_nbytes / timed(loop)

    def bare_broadcast(self) -> float:
        memory = HostWeightArena(self.whole).byte_tensor()[: self.whole.arena_nbytes]
        self.bare_group.barrier()
        return self.whole.payload_nbytes / timed(lambda: self.bare_group.broadcast(memory))

    def many_tensors(self, count: int) -> float:
        seed = self.many[count]
        return self.transfer(seed_process.make_manifest(seed.config), seed.port)

    def with_cores(self, name: str, transfer: Callable[[], float]) -> dict[str, float]:
        """The rate, and how many cores this process and the seeds together kept busy meanwhile."""
        processes = [psutil.Process(), *(psutil.Process(seed.process.pid) for seed in self.seeds.values())]

        def cpu_seconds() -> float:
            return sum(times.user + times.system for times in (process.cpu_times() for process in processes))

        start, before = time.perf_counter(), cpu_seconds()
        rate = transfer()
        return {name: rate, f"{name}_cores": (cpu_seconds() - before) / (time.perf_counter() - start)}

    def measure_round(self) -> dict[str, float]:
        port = {name: seed.port for name, seed in self.seeds.items()}
        return {
            "bare_reads": self.bare_reads(),
            "same": self.transfer(self.whole, port["tp1"]),
            "tensors_16": self.many_tensors(16),
            "tensors_4096": self.many_tensors(4096),
            "tp2_to_tp1": self.transfer(self.whole, port["tp2"]),
            "tp1_to_tp2": self.transfer(self.manifest(1, tp_size=2), port["tp1"]),
            "tp1_to_tp4": self.transfer(self.manifest(2, tp_size=4), port["tp1"]),
            "tp4_to_tp2pp2": self.transfer(self.manifest(3, tp_size=2, pp_size=2), port["tp4"]),
            **self.with_cores("one_seed", lambda: self.transfer(self.whole, port["tp1"])),
            **self.with_cores("two_seeds", lambda: self.transfer(self.whole, port["tp1"], port["other tp1"])),
            "bare_broadcast": self.bare_broadcast(),
            "broadcast": self.transfer(self.whole, port["tp1"], backend="nccl"),
            "broadcast_tp2_to_tp1": self.transfer(self.whole, port["tp2"], backend="nccl"),
        }


def make_rows(rounds: list[dict[str, float]]) -> list[tuple[str, str]]:
    def row(label: str, name: str, of: str = "", what: str = "") -> tuple[str, str]:
        speed = f"{median([one[name] for one in rounds]) / 1e9:.2f} GB/s"
        if of:
            speed += f", {median([one[name] / one[of] for one in rounds]):.2f} x {what}"
        return label, speed

    return [
        row("bare Mooncake loop", "bare_reads"),
        row("transfer_engine, same topology", "same", "bare_reads", "the bare loop"),
        row("transfer_engine, a quarter of the bytes in 4096 tensors", "tensors_4096", "tensors_16", "in 16 tensors"),
        row("transfer_engine, tp2 to tp1", "tp2_to_tp1", "same", "same topology"),
        row("transfer_engine, tp1 to a rank of tp2", "tp1_to_tp2", "same", "same topology"),
        row("transfer_engine, tp1 to a rank of tp4", "tp1_to_tp4", "same", "same topology"),
        row("transfer_engine, tp4 to a rank of tp2 x pp2", "tp4_to_tp2pp2", "same", "same topology"),
        row("transfer_engine, two seeds", "two_seeds", "one_seed", "one seed"),
        (
            "cores kept busy by client and seeds: one seed, two seeds",
            f"{median([one['one_seed_cores'] for one in rounds]):.2f}, "
            f"{median([one['two_seeds_cores'] for one in rounds]):.2f} of {psutil.cpu_count()}",
        ),
        row("bare gloo broadcast", "bare_broadcast"),
        row("broadcast backend, same topology", "broadcast", "bare_broadcast", "the bare broadcast"),
        row("broadcast backend, tp2 to tp1", "broadcast_tp2_to_tp1", "broadcast", "same topology"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12, help="of 30 MB each")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ramet-bench-") as folder, ExitStack() as stack:
        write_random_model(Path(folder), "llama3", dtype="bfloat16", num_hidden_layers=args.layers, **SHAPE)
        bench = Bench(Path(folder), stack, args.rounds + 1)
        bench.measure_round()  # imports, connections and the machine's memory are warm after it
        rounds = [bench.measure_round() for _ in range(args.rounds)]
        name = f"Transfers: {bench.whole.payload_nbytes / 1e9:.2f} GB over loopback"
        report(name, args.output, make_rows(rounds), {"nbytes": bench.whole.payload_nbytes, "rounds": rounds})


if __name__ == "__main__":
    main()
