"""How fast instances take a trainer's weights, and how long they plan after it was started again.

    python benchmark/bench_trainer.py [--only plan,pull] [--device cpu]

`plan` needs no GPU: an 8 B model (Qwen3-8B's shape), a trainer of two tensor-parallel ranks that has been started
again; each rank of an instance of one and of two reads what the ranks answer and plans anew. The least of some rounds,
in time of one core. `pull` has a trainer of two processes, each with a shard of the model on a GPU of its own: as FSDP2
shards it, and tensor-parallel. This process is an instance of one rank on the first GPU, then both ranks of one of two;
they take it by CUDA IPC, beside a plain copy of as many bytes between the GPUs. With one GPU both shards are on that.
`--device cpu` tries all of it out with a tiny model: its figures of `pull` mean nothing.
"""
# ruff: noqa: E402 - the models are in the tests' folder, which has to be made importable first

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_common import RESULTS, ROOT, report
from gpu_model import SHAPE, TINY, write_config
from gpu_timing import on_device, time_on
from gpu_trainer import NUM_RANKS, TrainerOfTwo

sys.path.insert(0, str(ROOT / "test"))

import published_weights as pw
import sharded_models as sm
import torch
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.describe_model import describe_whole_model
from ramet.srt.model_loader.client.published import plan_pull, take_published
from ramet.srt.utils.net import SeedAddress, split_address
from ramet.srt.weights.planner import ArenaSource, plan
from ramet.srt.weights.registration import parse_answer

PARTS = ("plan", "pull")
ROUNDS = 5
INSTANCES = {"tp 1": {}, "tp 2": {"tp_size": 2}}
AIM_S = 0.05  # of planning anew
AIM_SHARE = 0.5  # of the plain copy's rate


@dataclass
class Row:
    """One figure, and what it is to reach."""

    what: str
    value: float
    unit: str
    note: str

    def texts(self) -> tuple[str, str]:
        return self.what, f"{self.value:.3g} {self.unit}{', ' * bool(self.note)}{self.note}"


@dataclass
class Rank:
    """A rank of an instance: memory for its weights, and what it holds."""

    stage: WeightArena
    whole: Any


def plan_anew(folder: Path) -> list[Row]:
    """The time of one core in which a rank plans, for each rank of each instance the slowest."""
    rows = []
    for name, sizes in INSTANCES.items():
        seconds = []
        for parallel in sm.ranks_of(**sizes):
            model = sm.build_model(folder, parallel)
            manifest = sm.make_manifest(model)
            whole = describe_whole_model(model.config, manifest)
            bodies = [pw.answer_of(whole.shapes, rank) for rank in range(NUM_RANKS)]
            rounds = []
            for _ in range(ROUNDS):
                begun = time.thread_time()
                answers = [parse_answer(body) for body in bodies]
                pull = plan_pull(manifest, answers, whole)
                sources = [ArenaSource(str(rank), answer.manifest) for rank, answer in enumerate(answers)]
                assert plan(pull.direct, sources).nbytes == manifest.payload_nbytes
                rounds.append(time.thread_time() - begun)
            seconds.append(min(rounds))
        note = f"aim {1e3 * AIM_S:.0f} ms; {'reached' if max(seconds) <= AIM_S else 'missed'}"
        rows.append(Row(f"planning anew, trainer tp 2 to instance {name}", 1e3 * max(seconds), "ms", note))
    return rows


def pull(folder: Path, config: dict[str, Any], devices: list[str]) -> list[Row]:
    rows = []
    with TrainerOfTwo(config, devices) as trainer:
        for layout in ("fsdp", "tp"):
            said = [trainer.publish(layout, f"{layout}-{number}") for number in range(2)][-1]
            rate = sum(one["bytes"] for one in said) / max(one["seconds"] for one in said)
            rows.append(Row(f"publish, {layout} over two", rate / 1e9, "GB/s", "a copy, hashed; both ranks together"))
            for name, sizes in INSTANCES.items():
                ranks = [make_rank(folder, *one) for one in zip(sm.ranks_of(**sizes), devices, strict=False)]
                limit = copy_rate(ranks, devices)
                rates, seconds = take_rounds(ranks, trainer.addresses, f"{layout}-1")
                share = statistics.median(rates) / limit
                note = f"{share:.2f} of a plain copy's {limit / 1e9:.0f} GB/s (aim {AIM_SHARE}); " \
                       f"all of it with checks {1e3 * statistics.median(seconds):.0f} ms"  # fmt: skip
                rows.append(Row(f"{layout} over two to {name}", statistics.median(rates) / 1e9, "GB/s", note))
                del ranks
                if devices[0] != "cpu":
                    torch.cuda.empty_cache()
    return rows


def make_rank(folder: Path, parallel: Any, device: str) -> Rank:
    model = sm.build_model(folder, parallel)
    manifest = sm.make_manifest(model)
    return Rank(allocate_arena(manifest, device), describe_whole_model(model.config, manifest))


def copy_rate(ranks: list[Rank], devices: list[str]) -> float:
    """Of plain copies into each rank's memory from the other GPU, at the same time."""

    def seconds_of(rank: Rank) -> float:
        memory = rank.stage.byte_tensor()
        other = next((one for one in devices if torch.device(one) != memory.device), devices[0])
        source = torch.empty_like(memory, device=other).fill_(1)
        return min(time_on(source.device, lambda: memory.copy_(source), ROUNDS))

    with ThreadPoolExecutor(len(ranks)) as pool:
        seconds = list(pool.map(seconds_of, ranks))
    return sum(rank.stage.byte_tensor().nbytes for rank in ranks) / max(seconds)


def take_rounds(ranks: list[Rank], addresses: list[str], version: str) -> tuple[list[float], list[float]]:
    """Bytes per second while bytes move, of all ranks at once, and seconds of all of it, in each round."""
    seeds = [SeedAddress(*split_address(one, "")) for one in addresses]
    config = LoadConfig(timeout_s=60.0)

    def take(rank: Rank) -> Any:
        memory = rank.stage.byte_tensor()
        with on_device(memory.device):
            memory.fill_(255)
            rank.stage.synchronize()
            taken = take_published(rank.stage, seeds, version, config, rank.whole)
        assert taken.verified and taken.source == "local_copy", f"it came by {taken.source}"
        return taken

    rates, seconds = [], []
    with ThreadPoolExecutor(len(ranks)) as pool:
        for _ in range(1 + ROUNDS):
            taken = list(pool.map(take, ranks))
            rates.append(sum(one.num_bytes for one in taken) / max(one.transfer_seconds for one in taken))
            seconds.append(max(one.seconds for one in taken))
    return rates[1:], seconds[1:]  # the first opens contexts and loads kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--work-dir", type=Path, default=RESULTS, help="where the model's config is put")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    parts = [part for part in args.only.split(",") if part]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: unknown parts {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    rows = []
    if "plan" in parts:
        rows += plan_anew(write_config(args.work_dir / "shape-8b", SHAPE))
    if "pull" in parts:
        config = SHAPE if args.device == "cuda" else TINY
        num_gpus = torch.cuda.device_count() if args.device == "cuda" else 0
        devices = [f"cuda:{min(rank, num_gpus - 1)}" if num_gpus else "cpu" for rank in range(NUM_RANKS)]
        rows += pull(write_config(args.work_dir / f"shape-{args.device}", config), config, devices)
    values = {"rows": [asdict(row) for row in rows]}
    report("Weights from a trainer", args.output, [row.texts() for row in rows], values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
