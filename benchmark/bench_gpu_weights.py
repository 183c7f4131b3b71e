"""How fast weights reach a GPU from each source, beside the plainest way to move the same bytes, in the same run.

    python benchmark/bench_gpu_weights.py [--only local,reshard,checkpoint,broadcast,network] [--work-dir FOLDER]

A seed process holds a random model in Qwen3-8B's shape (16.4 GB in bfloat16) on GPU 0, and split in two over GPU 0 and
GPU 1; this process is one rank of a client and loads with the real loader, without an engine around it. Rates of loads
are medians of some rounds; those of the limits, and of the bare broadcast, are of the best round. Every load but the
one from files compares checksums afterwards, which the whole time has in it. The parts: `local` (GPU to GPU, and on one
GPU, beside device-to-device copies), `reshard` (the same between topologies), `checkpoint` (files in the page cache,
beside a copy of pinned memory), `broadcast` (the backend nccl, beside one broadcast of torch.distributed) and `network`
(Mooncake over TCP, of a smaller model). A part that fails, or takes too long, leaves the others alone. With one GPU,
what needs two is left out. `--device cpu` runs all of it with a tiny model, to show that it works: its
figures mean nothing.

`--sweep-checkpoint` tries slice sizes and numbers of threads for reading files instead; `--profile-checkpoint` takes
the times of the stages of a process's first loads.
"""
# ruff: noqa: E402 - the models are in the tests' folder, which has to be made importable first

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench_common import RESULTS, ROOT, report, timed
from gpu_model import SHAPE, TINY, make_model, write_config
from gpu_timing import on_device, time_on
from gpu_weight_seed import WeightSeedProcess
from ramet.srt.model_loader.arena.allocate import allocate_arena

sys.path.insert(0, str(ROOT / "test"))

import sharded_models as sm
import torch
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.distributed.pair_group import RECEIVER, PairGroup, listen, open_store
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.loader import get_model_loader
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.report import LoadReport

# The parts in order of worth, and their time limits.
PART_TIMEOUT_S = {"local": 15.0, "reshard": 15.0, "checkpoint": 60.0, "broadcast": 20.0, "network": 30.0}
SWEEP_TIMEOUT_S = 200.0
NEEDED_TOPOLOGIES: dict[str, tuple[str, ...]] = {  # of the seed
    "local": ("tp1",), "reshard": ("tp1", "tp2"), "checkpoint": (), "broadcast": ("tp1",), "network": ("small",),
}  # fmt: skip
GRACE_S = 10.0  # for a part to notice that its time is over, before the whole run is ended
START_TIMEOUT_S = 60.0
ROUNDS = 5
PROFILED_LOADS = 4
SMALL = {"vocab_size": 32000, "num_hidden_layers": 2}  # of the model that goes over the network: 1.3 GB
SWEEP_SLICES_MB = (2, 4, 8)
SWEEP_THREADS = (8, 12, 16)


@dataclass
class Result:
    """One row of the table; rates are bytes per second."""

    what: str
    rate: float
    limit: float = 0.0
    limit_name: str = ""
    note: str = ""
    rounds: list[float] = field(default_factory=list)  # the rate of each

    def texts(self) -> tuple[str, str, str]:
        limit = f"{self.limit / 1e9:.1f} GB/s {self.limit_name} ({self.rate / self.limit:.0%})" if self.limit else ""
        return self.what, f"{self.rate / 1e9:.1f} GB/s{', ' * bool(self.note)}{self.note}", limit


class Bench:
    """The client: its arenas, the seed, and one method for each part, which appends to `results`."""

    def __init__(self, args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        on_gpu = args.device == "cuda"
        self.config = SHAPE if on_gpu else TINY
        if args.shape:
            self.config = json.loads((args.shape / "config.json").read_text())
        self.work_dir: Path = args.work_dir
        self.checkpoint_layers: int = min(args.checkpoint_layers, self.config["num_hidden_layers"])
        num_gpus = torch.cuda.device_count() if on_gpu else 0
        self.devices = [f"cuda:{min(i, num_gpus - 1)}" for i in range(2)] if on_gpu else ["cpu", "cpu"]
        self.has_pair = num_gpus != 1
        self.results: list[Result] = []
        self.failures: dict[str, str] = {}
        self._arenas: dict[tuple[str, str, int], WeightArena] = {}
        self.folder = write_config(self.work_dir / f"shape-{args.device}", self.config)
        small = self.config | (SMALL if on_gpu else {})
        self.small_folder = write_config(self.work_dir / f"shape-{args.device}-small", small)
        first, second = self.devices
        topologies = {
            "tp1": {"folder": str(self.folder), "sizes": {}, "devices": [first]},
            "tp2": {"folder": str(self.folder), "sizes": {"tp_size": 2}, "devices": [first, second]},
            "small": {"folder": str(self.small_folder), "sizes": {}, "devices": [first]},
        }
        names = {name for part in args.only for name in NEEDED_TOPOLOGIES[part]}
        self.seed: WeightSeedProcess | None = None
        if names and not (args.sweep_checkpoint or args.profile_checkpoint):
            chosen = {name: topologies[name] for name in sorted(names)}
            self.seed = stack.enter_context(WeightSeedProcess(chosen, START_TIMEOUT_S))

    # What the parts share

    def arena(self, folder: Path, device: str, rank: int = 0, **sizes: int) -> WeightArena:
        """The client's arena for one of its ranks; kept, so that its memory has been touched from the second use on."""
        key = (str(folder), f"{device} {sizes}", rank)
        if key not in self._arenas:
            manifest = sm.make_manifest(sm.build_model(folder, sm.ranks_of(**sizes)[rank]))
            self._arenas[key] = allocate_arena(manifest, device)
        return self._arenas[key]

    def release(self) -> None:
        """Give the arenas' memory back."""
        self._arenas.clear()
        if self.devices[0] != "cpu":
            torch.cuda.empty_cache()

    def give_up(self, output: Path | None) -> None:
        """Leave with what has been measured."""
        if self.seed is not None:
            self.seed.process.kill()
        write_report(self, output)

    def load(self, arena: WeightArena, topology: str, **options: Any) -> LoadReport:
        """One load from the seed, into memory that holds something else."""
        assert self.seed is not None
        arena.byte_tensor().fill_(255)
        self.synchronize()
        config = LoadConfig(
            load_format="remote_instance", seeds=(SeedAddress("127.0.0.1", self.seed.ports[topology]),),
            fallback="error", timeout_s=20.0, **options,
        )  # fmt: skip
        start = time.perf_counter()
        with on_device(arena.byte_tensor().device):
            result = get_model_loader(config).load_weights(arena.manifest, arena, "/nonexistent").report
        result.seconds = time.perf_counter() - start
        assert result.verified, "the load was not verified"
        return result

    def measure(self, what: str, limit: float, limit_name: str, arena: WeightArena, topology: str, source: str,
                **options: Any) -> list[LoadReport]:  # fmt: skip
        """Some loads, and their row: the median of the rates while bytes move, and of the whole times."""
        loads = [self.load(arena, topology, **options) for _ in range(ROUNDS)]
        assert {load.source for load in loads} == {source}, f"it came from {loads[0].source}, not {source}"
        rates = [load.num_bytes / load.transfer_seconds for load in loads]
        whole = statistics.median(load.seconds for load in loads)
        note = f"{loads[0].num_bytes / 1e9:.2f} GB; whole load with checks {whole * 1e3:.0f} ms"
        self.add(Result(what, statistics.median(rates), limit, limit_name, note, rates))
        return loads

    def add(self, result: Result) -> None:
        self.results.append(result)
        print("| " + " | ".join(result.texts()) + " |", flush=True)

    def synchronize(self) -> None:
        for device in set(self.devices) - {"cpu"}:
            torch.cuda.synchronize(device)

    def copy_rate(self, source_device: str, target: WeightArena) -> float:
        """Of a plain copy between devices into an arena's memory."""
        memory = target.byte_tensor()
        source = torch.empty_like(memory, device=source_device).fill_(1)
        return memory.nbytes / min(time_on(source.device, lambda: memory.copy_(source), 5))

    # The parts

    def local(self) -> None:
        first, second = self.devices
        cases = [("`local`, GPU to GPU", second)] if self.has_pair else []
        for what, device in [*cases, ("`local`, same GPU", first)]:
            arena = self.arena(self.folder, device)
            limit = self.copy_rate(first, arena)
            self.measure(what, limit, "plain copy", arena, "tp1", "local_copy", local_mode="copy")

    def reshard(self) -> None:
        """Whole ranks, beside the copy from the other GPU, or from the same one where all bytes are there."""
        first, second = self.devices
        across = "plain copy between GPUs" if self.has_pair else "plain copy"
        whole = self.arena(self.folder, first)
        limit = self.copy_rate(second, whole)
        self.measure("`local`, tp2 to tp1, half from the other GPU", limit, across, whole, "tp2", "local_copy",
                     local_mode="copy")  # fmt: skip
        for rank, device in enumerate(self.devices):
            half = self.arena(self.folder, device, rank, tp_size=2)
            limit = self.copy_rate(first, half)
            where = "on the same GPU" if device == first else "on the other GPU"
            name = across if device != first or first == second else "same-GPU copy"
            self.measure(f"`local`, tp1 to rank {rank} of tp2, {where}", limit, name, half, "tp1", "local_copy",
                         local_mode="copy")  # fmt: skip
        if self.devices[1] != "cpu":
            self.measure_rows(half, limit)

    def measure_rows(self, arena: WeightArena, limit: float) -> None:
        """The strided rows of one such load by themselves: they are queued before the rest, with a mark in between."""
        from ramet.srt.model_loader.arena import cuda_copies
        from ramet.srt.weights.copy_op import CopyOp

        queue, marks, sizes = cuda_copies.queue_copies, [torch.cuda.Event(enable_timing=True) for _ in range(2)], []

        def queue_rows_first(ops: list[CopyOp], source: int, target: int, stream: int) -> None:
            rows = [op for op in ops if op.num_rows > 1]
            on = torch.cuda.ExternalStream(stream)
            marks[0].record(on)
            queue(rows, source, target, stream)
            marks[1].record(on)
            queue([op for op in ops if op.num_rows == 1], source, target, stream)
            sizes.append(sum(op.nbytes for op in rows))

        cuda_copies.queue_copies = queue_rows_first
        try:
            self.load(arena, "tp1", local_mode="copy")
        finally:
            cuda_copies.queue_copies = queue
        rate = sizes[0] / (marks[0].elapsed_time(marks[1]) / 1e3)
        self.add(Result("of these, the strided rows alone", rate, limit, "plain copy", f"{sizes[0] / 1e9:.2f} GB"))

    def checkpoint(self) -> None:
        """The first of the loads may find files that are not in the page cache."""
        arena, folder = self.open_checkpoint()
        limit = self.host_copy_rate(arena)
        seconds = []
        for _ in range(ROUNDS + 1):
            arena.byte_tensor().fill_(255)
            self.synchronize()
            seconds.append(timed(lambda: get_model_loader(LoadConfig()).load_weights(arena.manifest, arena, folder)))
        rates = [arena.manifest.payload_nbytes / one for one in seconds]
        name = "`checkpoint` from the page cache"
        note = f"{arena.manifest.payload_nbytes / 1e9:.2f} GB, planning included; first {rates[0] / 1e9:.1f}"
        self.add(Result(name, statistics.median(rates[1:]), limit, "pinned copy", note, rates))

    def open_checkpoint(self) -> tuple[WeightArena, str]:
        """An arena and files for it."""
        layers = self.checkpoint_layers
        config = self.config | {"num_hidden_layers": layers}
        kind = self.devices[0].split(":")[0]
        name = "model-8b" if config == SHAPE else f"model-{kind}-{layers}-layers"  # the first is bench_gpu.py's, too
        self.release()
        folder = make_model(self.work_dir / name, config, kind)
        return self.arena(folder, self.devices[0]), str(folder)

    def host_copy_rate(self, arena: WeightArena) -> float:
        memory = arena.byte_tensor()
        host = torch.ones(min(1 << 30, memory.nbytes), dtype=torch.uint8, pin_memory=memory.is_cuda)
        part = memory[: host.nbytes]
        return host.nbytes / min(time_on(memory.device, lambda: part.copy_(host, non_blocking=True), 5))

    def broadcast(self) -> None:
        if not self.has_pair:
            print("NCCL needs two GPUs")
            return
        assert self.seed is not None
        arena = self.arena(self.folder, self.devices[1])
        memory = arena.byte_tensor()
        store = open_store(listen("127.0.0.1", 0), "127.0.0.1", 20.0)
        start = time.perf_counter()
        self.seed.broadcast("tp1", store.port, ROUNDS)
        group = PairGroup(store, "bare", RECEIVER, memory.device, "127.0.0.1", 20.0)
        group.barrier()
        setup, times = time.perf_counter() - start, []
        for round_ in range(ROUNDS):
            if round_:
                group.barrier()
            times.append(timed(lambda: group.broadcast(memory)))
        group.close()
        rates = [memory.nbytes / seconds for seconds in times]
        limit = max(rates)
        self.add(Result("one bare broadcast", limit, note=f"group set-up {setup:.2f} s", rounds=rates))
        loads = self.measure("backend `nccl`", limit, "bare broadcast", arena, "tp1", "nccl", backend="nccl",
                             local_mode="off")  # fmt: skip
        rest = statistics.median(load.seconds - load.transfer_seconds for load in loads)
        self.results[-1].note += f", of that group set-up, planning and checks {rest:.2f} s"

    def network(self) -> None:
        arena = self.arena(self.small_folder, self.devices[1])
        self.measure("`transfer_engine` over TCP", 0.0, "", arena, "small", "transfer_engine", local_mode="off")

    def profile_checkpoint(self) -> None:
        """Where the time of this process's first loads from files goes; nothing has been copied before them."""
        begin = time.perf_counter()
        from load_stages import LoadStages  # with the readers

        print(f"importing the readers: {1e3 * (time.perf_counter() - begin):.0f} ms")
        arena, folder = self.open_checkpoint()
        for number in range(1, 1 + PROFILED_LOADS):
            arena.byte_tensor().fill_(255)
            self.synchronize()
            stages = LoadStages()
            with stages.recording(arena):
                seconds = timed(lambda: get_model_loader(LoadConfig()).load_weights(arena.manifest, arena, folder))
            print(f"\nload {number}: {1e3 * seconds:.0f} ms", *stages.table(), sep="\n", flush=True)
            self.results.append(Result(f"load {number} of a process", arena.manifest.payload_nbytes / seconds))

    def sweep_checkpoint(self) -> None:
        """Rates of reading files with several slice sizes and numbers of threads; and without the copies."""
        from ramet.srt.model_loader.arena import cuda_reader as reader
        from ramet.srt.model_loader.checkpoint.source import CheckpointSource
        from ramet.srt.utils import cuda_driver

        arena, folder = self.open_checkpoint()
        limit = self.host_copy_rate(arena)
        source = CheckpointSource(folder)
        planning = timed(lambda: source.plan(arena.manifest))
        plan = source.plan(arena.manifest)
        print(f"pinned copy {limit / 1e9:.1f} GB/s, planning {planning * 1e3:.0f} ms, {plan.nbytes / 1e9:.2f} GB")
        print("slice MB, threads: GB/s first, best of 3; reads alone")
        upload = cuda_driver.queue_upload
        for threads in SWEEP_THREADS:
            for slice_mb in SWEEP_SLICES_MB:
                reader.MAX_READERS, reader.SLICE_BYTES = threads, slice_mb << 20
                rates = [plan.nbytes / timed(lambda: source.fill(plan, arena)) for _ in range(3)]
                cuda_driver.queue_upload = lambda *_: None
                alone = plan.nbytes / timed(lambda: source.fill(plan, arena))
                cuda_driver.queue_upload = upload
                print(
                    f"{slice_mb}, {threads}: {rates[0] / 1e9:.1f}, {max(rates) / 1e9:.1f}; {alone / 1e9:.1f}",
                    flush=True,
                )
                what = f"{slice_mb} MB, {threads} threads"
                note = f"reads alone {alone / 1e9:.1f}"
                self.results.append(Result(what, max(rates), limit, "pinned copy", note, rates))


@contextlib.contextmanager
def time_limit(seconds: float, on_hang: Callable[[], None]) -> Iterator[None]:
    """Raise TimeoutError in this (the main) thread; one that is stuck outside of Python ends the whole process."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds:g} s")

    def give_up() -> None:
        on_hang()
        os._exit(3)

    hang = threading.Timer(seconds + GRACE_S, give_up)
    hang.daemon = True
    before = signal.signal(signal.SIGALRM, interrupt)
    hang.start()
    try:  # the time may be over at any line from here on, and this process goes on then
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        hang.cancel()
        signal.signal(signal.SIGALRM, before)


def write_report(bench: Bench, output: Path | None) -> None:
    """The table in Markdown, and all of it as JSON."""
    print("\n| what | measured | limit |\n|---|---|---|")
    for result in bench.results:
        print("| " + " | ".join(result.texts()) + " |")
    for part, reason in bench.failures.items():
        print(f"| {part} | failed: {reason} | |")
    rows = [(what, f"{measured}; {limit}" if limit else measured) for what, measured, limit in
            (result.texts() for result in bench.results)]  # fmt: skip
    rows += [(part, f"failed: {reason}") for part, reason in bench.failures.items()]
    values = {"results": [asdict(result) for result in bench.results], "failures": bench.failures,
              "devices": bench.devices}  # fmt: skip
    report("Weights on GPUs" if bench.devices[0] != "cpu" else "Weights, tried out on a CPU", output, rows, values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PART_TIMEOUT_S), help="parts to measure")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", type=Path, help="folder of a config.json, for another model than Qwen3-8B's shape")
    parser.add_argument("--work-dir", type=Path, default=RESULTS, help="where the model's files are, or are made")
    parser.add_argument("--checkpoint-layers", type=int, default=SHAPE["num_hidden_layers"],
                        help="of the model that is read from files; fewer are written sooner")  # fmt: skip
    parser.add_argument("--sweep-checkpoint", action="store_true", help="instead of the parts")
    parser.add_argument("--profile-checkpoint", action="store_true", help="instead of the parts")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    args.only = [part for part in args.only.split(",") if part]
    if unknown := set(args.only) - set(PART_TIMEOUT_S):
        parser.error(f"--only: unknown parts {', '.join(sorted(unknown))}; known are {', '.join(PART_TIMEOUT_S)}")
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        bench = Bench(args, stack)
        parts = {part: seconds for part, seconds in PART_TIMEOUT_S.items() if part in args.only}
        if args.sweep_checkpoint:
            parts = {"sweep_checkpoint": SWEEP_TIMEOUT_S}
        if args.profile_checkpoint:
            parts = {"profile_checkpoint": PART_TIMEOUT_S["checkpoint"]}
        if bench.seed is not None:
            bench.synchronize()  # this process's contexts are made beside the seed's start
            bench.seed.wait_ready()
        print(f"ready after {time.perf_counter() - start:.1f} s", flush=True)
        for part, seconds in parts.items():
            begin = time.perf_counter()
            try:
                with time_limit(seconds, lambda: bench.give_up(args.output)):
                    getattr(bench, part)()
            except Exception as error:  # noqa: BLE001 - of whatever kind: the other parts are measured all the same
                traceback.print_exc()
                bench.failures[part] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{part}: {time.perf_counter() - begin:.1f} s", flush=True)
        write_report(bench, args.output)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
