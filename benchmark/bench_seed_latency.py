"""What a seed's users notice while it gives its weights away: time per token, idle and while it is read in each way.

    python benchmark/bench_seed_latency.py [--rounds 3] [--layers 6]

A seed serves one request after the other; in the same machine a client takes its weights again and again, one way at a
time. With few cores most of the difference is the client, and the network inside of the machine, needing them too: "a
busy neighbour" is what a process does to the seed that only copies memory and has nothing to do with it.
"""
# ruff: noqa: E402 - the seed server is in the tests' folder, which has to be made importable first

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench_common import ROOT, Server, report, running

sys.path.insert(0, str(ROOT / "test"))

import sharded_models as sm
from bench_transfers import SHAPE
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.host import HostWeightArena
from ramet.srt.model_loader.client.open_sources import SeedSources
from ramet.srt.model_loader.client.seed_instance import SeedInstance
from ramet.srt.model_loader.client.transfer import SeedTransfer
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.manifest import WeightManifest
from random_models import write_tokenizer
from seed_server import write_random_model

NUM_TOKENS = 48
NEIGHBOUR = "a = bytearray(1 << 28)\nwhile True: b = bytes(a)"
WAYS = {
    "read over transfer_engine": {"local_mode": "off"},
    "sent by broadcast": {"local_mode": "off", "backend": "nccl"},
    "copied on the same host": {"local_mode": "copy"},
}


def seconds_per_token(server: Server) -> float:
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}}
    start = time.perf_counter()
    server.call("/generate", body)
    return (time.perf_counter() - start) / NUM_TOKENS


@contextmanager
def repeatedly(work: Callable[[], None]) -> Iterator[list[int]]:
    """Run `work` over and over in a thread; the list has one item for each time it was done."""
    stop, done = threading.Event(), []

    def loop() -> None:
        while not stop.is_set():
            work()
            done.append(1)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


def take(server: Server, manifest: WeightManifest, options: dict[str, str]) -> None:
    config = LoadConfig(timeout_s=60, **options)
    seed = SeedInstance(SeedAddress("127.0.0.1", server.port), config, manifest)
    seed.find_ranks()
    arena = HostWeightArena(manifest)
    SeedTransfer(arena, [seed], lambda: SeedSources(arena, config)).run()


def measure_round(server: Server, manifest: WeightManifest) -> dict[str, float]:
    result = {"idle": seconds_per_token(server)}
    neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])
    try:
        result["beside a busy neighbour"] = seconds_per_token(server)
    finally:
        neighbour.kill()
        neighbour.wait()
    for name, options in WAYS.items():
        with repeatedly(lambda options=options: take(server, manifest, options)) as done:
            result[name] = seconds_per_token(server)
        result[f"{name}, transfers"] = len(done)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6, help="of 30 MB each")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ramet-bench-") as folder:
        model = write_random_model(Path(folder), "llama3", dtype="bfloat16", num_hidden_layers=args.layers, **SHAPE)
        write_tokenizer(model)
        manifest = sm.make_manifest(sm.build_model(model, sm.ranks_of()[0]))
        flags = ["--remote-instance-weight-loader-start-seed-via-transfer-engine", "--served-model-name", "random"]
        with running(model, *flags, "--max-total-tokens", "4096") as server:
            measure_round(server, manifest)  # imports and connections
            rounds = [measure_round(server, manifest) for _ in range(args.rounds)]
    rows = []
    for name in ("idle", "beside a busy neighbour", *WAYS):
        ratio = median([one[name] / one["idle"] for one in rounds])
        milliseconds = median([one[name] for one in rounds]) * 1e3
        rows.append((name, f"{milliseconds:.1f} ms per token, {ratio:.2f} x idle"))
    report("A seed's latency", args.output, rows, {"rounds": rounds})


if __name__ == "__main__":
    main()
