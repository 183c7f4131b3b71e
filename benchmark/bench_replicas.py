"""Replicas started at the same moment with the same command: who reads the files, who clones from whom, time to ready.

    python benchmark/bench_replicas.py [--counts 1,2,4,8] [--rounds 2] [--layers 2] [-- more flags for the replicas]

They find each other through one metadata server in a process of its own; each round starts a new one. The model is a
random one in bfloat16. What a replica has read and from whom it cloned is what its load report says. All of them share
the machine, so with few cores most of the time is their imports, one after the other; compare with a count of 1.
"""
# ruff: noqa: E402 - the model's maker is in the tests' folder, which has to be made importable first

import argparse
import contextlib
import json
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from bench_common import ROOT, MetadataServer, Server, read_weights, report, running_metadata_server, weights_nbytes

sys.path.insert(0, str(ROOT / "test"))
from bench_transfers import SHAPE
from random_models import write_tokenizer
from seed_server import write_random_model

FLAGS = ["--load-format", "remote_instance", "--remote-instance-weight-loader-backend", "modelexpress"]
FLAGS += ["--served-model-name", "random", "--max-total-tokens", "256"]
POLL_S = 0.1  # rarely: whoever waits for so many replicas must not take the processor from them


def stop_server(starting: "Future[Server]") -> None:
    """End a replica; one that has failed has ended."""
    with contextlib.suppress(RuntimeError):
        starting.result().stop()


def measure_round(model: Path, count: int, flags: list[str]) -> dict[str, Any]:
    """Start `count` replicas, wait until all are ready, ask what each has done, and end them."""
    read_weights(model)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ramet-bench-"))
        metadata = stack.enter_context(running_metadata_server(Path(folder)))
        pool = stack.enter_context(ThreadPoolExecutor(count))
        config = ["--modelexpress-config", json.dumps({"url": metadata.address})]
        begin = time.monotonic()
        starting = [pool.submit(Server, model, *FLAGS, *config, *flags, poll_s=POLL_S) for _ in range(count)]
        for one in starting:
            stack.callback(stop_server, one)
        servers = [one.result() for one in starting]
        seconds = time.monotonic() - begin
        owners = find_owners(metadata)
        replicas = {server.url: server.rank_info()["load_report"] for server in servers}
    for load in replicas.values():
        load["cloned_from"] = [owners[worker_id] for worker_id in load["taken_from"]]
    return {"seconds": seconds, "ready_s": [server.ready_s for server in servers], "replicas": replicas}


def find_owners(metadata: MetadataServer) -> dict[str, str]:
    """By worker id: the URL of the replica that has published under it."""
    with urllib.request.urlopen(f"{metadata.http_url}/fleet.json", timeout=10) as response:
        models = json.load(response)["models"]
    instances = [instance for one in models for instance in one["instances"]]
    return {worker["worker_id"]: instance["name"] for instance in instances for worker in instance["workers"]}


def files_nbytes(result: dict[str, Any]) -> int:
    """Bytes of weights that the replicas of a round have taken from files."""
    return sum(load["num_bytes"] for load in result["replicas"].values() if "checkpoint" in load["source"])


def describe_family(result: dict[str, Any]) -> str:
    """Who cloned from whom, with the replicas numbered in the order of their start."""
    numbers = {url: index for index, url in enumerate(result["replicas"])}
    parts = []
    for url, load in result["replicas"].items():
        givers = ", ".join(str(numbers[giver]) for giver in load["cloned_from"]) or "files"
        parts.append(f"{numbers[url]} from {givers} ({load['source']})")
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1,2,4,8", help="replicas started at once, one number after the other")
    parser.add_argument("--rounds", type=int, default=2, help="of each count, the counts alternating")
    parser.add_argument("--layers", type=int, default=2, help="of the model, 30 MB each")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("server_flags", nargs="*", help="after --: more flags for the replicas")
    args = parser.parse_args()
    counts = [int(count) for count in args.counts.split(",")]
    with tempfile.TemporaryDirectory(prefix="ramet-bench-") as folder:
        model = write_random_model(Path(folder), "llama3", dtype="bfloat16", num_hidden_layers=args.layers, **SHAPE)
        write_tokenizer(model)
        size = weights_nbytes(model)
        rounds = [
            {count: measure_round(model, count, args.server_flags) for count in counts} for _ in range(args.rounds)
        ]
    rows = [("the model's files", f"{size / 1e6:.0f} MB")]
    for count in counts:
        results = [one[count] for one in rounds]
        readers = [sum("checkpoint" in load["source"] for load in one["replicas"].values()) for one in results]
        rows.append((f"{count} at once: all ready", f"{median([one['seconds'] for one in results]):.2f} s"))
        read = ", ".join(f"{files_nbytes(one) / size:.2f}" for one in results)
        rows.append((f"{count} at once: read from files", f"{read} x the model, by {', '.join(map(str, readers))}"))
        rows.append((f"{count} at once: who from whom", describe_family(results[-1])))
    report("Replicas started at once", args.output, rows, {"files_nbytes": size, "rounds": rounds})


if __name__ == "__main__":
    main()
