"""What finding a seed by what it serves adds to a load, against the same load from the same seed by address.

    python benchmark/bench_discovery.py [--sources 100] [--tensors 300] [--rounds 20]

The seed and the metadata server are processes of their own; the other sources listed are busier, so nobody asks them.
Every round loads once each way, with a client as new as a starting instance's: its connections are made in the load.
What a process needs once, importing grpc and protobuf, is measured apart, in processes that have imported the loader.
"""
# ruff: noqa: E402 - the toy seed is in the tests' folder, which has to be made importable first

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench_common import ROOT, free_port, percentile, report, running_metadata_server

sys.path.insert(0, str(ROOT / "test"))
from loading_client import LoadingClient
from seed_process import SeedProcess

IMPORTS = """
import time
import ramet.srt.model_loader.loader
start = time.perf_counter()
import ramet.srt.modelexpress.client.seed_search
print(time.perf_counter() - start)
"""


def time_imports() -> float:
    """Seconds that discovery's imports take in a process that has imported the loader."""
    result = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
    return float(result.stdout)


def time_load(client: LoadingClient, source: str) -> float:
    """Seconds of one load, which must not have come from anywhere else."""
    start = time.perf_counter()
    result = client.load()
    seconds = time.perf_counter() - start
    if result.source != source or result.fallback_reason:
        raise RuntimeError(f"loaded from {result.source} and not {source}: {result.fallback_reason}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=100, help="listed under the model's identity")
    parser.add_argument("--tensors", type=int, default=300, help="of the model, 8 kB each")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    config = {"shapes": {f"layers.{index}.weight": [32, 64] for index in range(args.tensors)}}
    values: dict[str, dict[str, list[float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="ramet-bench-") as folder,
        running_metadata_server(Path(folder)) as server,
        SeedProcess(**config) as seed,
    ):
        publisher = LoadingClient(server.address, config)
        for _ in range(args.sources - 1):
            publisher.publish(free_port(), load=1.0)
        publisher.publish(seed.port, load=0.0)
        for source, options in {"local_map": {"local_mode": "auto"}, "transfer_engine": {"local_mode": "off"}}.items():
            times: dict[str, list[float]] = {"by name": [], "by address": []}
            for _ in range(args.rounds + 1):
                times["by name"].append(time_load(LoadingClient(server.address, config, **options), source))
                times["by address"].append(time_load(LoadingClient.of_seeds([seed.port], config, **options), source))
            values[source] = {name: seconds[1:] for name, seconds in times.items()}  # the first one imports
    imports = [time_imports() for _ in range(5)]
    rows = [("listed", f"{args.sources} sources, {args.tensors} tensors each")]
    for source, times in values.items():
        added = [name - address for name, address in zip(times["by name"], times["by address"], strict=True)]
        rows += [(f"{source}, {way}", f"{median(seconds) * 1e3:.1f} ms") for way, seconds in times.items()]
        text = f"{median(added) * 1e3:.1f} ms (worst of {args.rounds}: {percentile(added, 1) * 1e3:.1f} ms)"
        rows.append((f"{source}: discovery adds", text))
    rows.append(("once per process: imports", f"{median(imports) * 1e3:.0f} ms"))
    report("discovery", args.output, rows, {"seconds": values, "imports_s": imports})


if __name__ == "__main__":
    main()
