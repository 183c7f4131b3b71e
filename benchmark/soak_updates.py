"""Changes the weights of an instance under load again and again, and watches that nothing grows or answers wrongly.

    python benchmark/soak_updates.py [--minutes 20] [--every 5]

By turns the weights come from files, from a second instance, and from what served before; and what can't be served is
refused: files of another shape. After each, the instance must answer as the version that it names does, and its
processes are counted: memory of their own and memory files, open files, threads, processes. The models are two small
random ones. The last line is the result as JSON; exit code 1 if its verdict is not "no growth". What
stands behind -- is more flags for the instance, --tp-size 2 for example.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.error
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_common import ROOT, Server, report, running
from soak_clones import OFFER, Load, process_tree, take_sample

SERVER_FLAGS = ["--device", "cpu", "--max-total-tokens", "4096", "--max-running-requests", "8"]
QUESTION = {"input_ids": [5, 6, 7, 8], "sampling_params": {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}}
NUM_COMPARED = 4  # samples at each end, of a whole round of sources each
MEMORY_FILE = "/memfd:"


@dataclass
class Sample:
    """What the instance holds."""

    own_bytes: int
    memory_file_bytes: int
    num_files: int
    num_threads: int
    num_processes: int


# Growth that is allowed in a whole run; see soak_clones.py. Of processes there is none.
BOUNDS = Sample(own_bytes=64 << 20, memory_file_bytes=4 << 20, num_files=8, num_threads=8, num_processes=0)


def memory_file_bytes(processes: list[int]) -> int:
    """What takes memory of the memory files that any of some processes has open, each once."""
    sizes: dict[int, int] = {}
    for process in processes:
        try:
            handles = list(Path(f"/proc/{process}/fd").iterdir())
        except OSError:
            continue  # it has ended
        for handle in handles:
            try:
                if str(handle.readlink()).startswith(MEMORY_FILE):
                    status = handle.stat()
                    sizes[status.st_ino] = 512 * status.st_blocks
            except OSError:
                continue  # it has been closed
    return sum(sizes.values())


def sample_of(server: Server) -> Sample:
    processes = process_tree(server.process.pid)
    counted = take_sample(server.process.pid, None)
    return Sample(counted.host_bytes, memory_file_bytes(processes), counted.num_files, counted.num_threads,
                  len(processes))  # fmt: skip


def settled_sample(server: Server, timeout_s: float = 3.0) -> Sample:
    """Once the number of processes stays: what a change of weights has started or ends is still on its way."""
    deadline = time.monotonic() + timeout_s
    last = sample_of(server)
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = sample_of(server)
        if now.num_processes == last.num_processes:
            return now
        last = now
    return last


class Changes:
    """The instance, what it should answer, and what it is asked to do next."""

    def __init__(self, server: Server, peer: Server, paths: dict[str, Path]) -> None:
        self._server = server
        self._paths = paths
        self._peer = f"127.0.0.1:{peer.port}"
        self.expected = {"old": self.ask()["output_ids"], "new": peer.call("/generate", QUESTION)["output_ids"]}
        self.faults: list[str] = []
        self.pauses_s: list[float] = []
        if self.expected["old"] == self.expected["new"]:
            self.faults.append("both models answer alike: nothing can be said about versions")

    def ask(self) -> dict[str, Any]:
        return self._server.call("/generate", QUESTION)

    def run(self, number: int) -> None:
        """One change, and what must be true after it."""
        name = f"{number}"
        kind, model, path, body = self._next(number)
        try:
            answer = self._server.call(path, body)
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
        if kind == "refused":
            if answer["success"] or "is another model" not in answer["message"]:
                self.faults.append(f"change {name}: files of another model were taken")
            return
        if not answer.get("success"):
            self.faults.append(f"change {name} ({kind}): {answer}")
            return
        self.pauses_s.append(answer["pause_seconds"])
        told = self.ask()
        version = told["meta_info"]["weight_version"]
        if told["output_ids"] != self.expected[model] or version != answer["weight_version"]:
            self.faults.append(f"change {name} ({kind}): {version} answers {told['output_ids']}")

    def _next(self, number: int) -> tuple[str, str, str, dict[str, Any]]:
        """Its kind, the model that serves afterwards, the route and the body."""
        body = {"weight_version": f"step-{number}"}
        round_ = (
            ("files", "new", "/update_weights_from_disk", body | {"model_path": str(self._paths["new"])}),
            ("files", "old", "/update_weights_from_disk", body | {"model_path": str(self._paths["old"])}),
            ("refused", "old", "/update_weights_from_disk", body | {"model_path": str(self._paths["strange"])}),
            ("instance", "new", "/update_weights_from_instance", body | {"address": self._peer}),
            ("rollback", "old", "/rollback_weights", {}),
        )
        return round_[number % len(round_)]


def find_growth(samples: list[Sample], warm_up: int) -> list[str]:
    """What has grown since the first samples after the warm-up."""
    counted = samples[warm_up:]
    if len(counted) < 2 * NUM_COMPARED:
        return [f"only {len(counted)} samples after the warm-up: nothing can be said about growth"]
    growth = []
    for name, bound in asdict(BOUNDS).items():
        first, last = (
            statistics.median_low([getattr(sample, name) for sample in part])
            for part in (counted[:NUM_COMPARED], counted[-NUM_COMPARED:])
        )
        if last - first > bound:
            growth.append(f"{name} has grown from {first} to {last}; {bound} more is allowed")
    return growth


def make_models(folder: Path) -> dict[str, Path]:
    sys.path.insert(0, str(ROOT / "test"))
    import random_models

    made = {
        name: random_models.make_model(folder / name, "llama3", seed=seed) for seed, name in enumerate(("old", "new"))
    }
    return made | {"strange": random_models.make_model(folder / "strange", "llama3", rope_theta=7000.0)}


def soak(paths: dict[str, Path], args: argparse.Namespace) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    samples: list[Sample] = []
    with (
        running(paths["new"], *SERVER_FLAGS, OFFER) as peer,
        running(paths["old"], *SERVER_FLAGS, OFFER, *args.server_flags) as server,
    ):
        changes = Changes(server, peer, paths)
        end, number = time.monotonic() + 60 * args.minutes, 0
        with Load(server, args.concurrency) as load:
            while time.monotonic() < end:
                start = time.monotonic()
                changes.run(number)
                if number % 5 == 4:  # after the same kind of change each time
                    samples.append(settled_sample(server))
                    print(f"change {number}: {samples[-1]}", file=sys.stderr, flush=True)
                number += 1
                time.sleep(max(0.0, min(end, start + args.every) - time.monotonic()))
    faults = changes.faults + [f"load: {error}" for error in load.errors[:3]]
    faults += [] if load.seconds else ["load: no request has ended"]
    growth = find_growth(samples, args.warm_up)
    verdict = "; ".join([*faults, *growth]) or "no growth"
    values = {
        "verdict": verdict, "num_changes": number, "num_requests": len(load.seconds),
        "longest_pause_ms": 1e3 * max(changes.pauses_s, default=0.0),
        "first": asdict(samples[min(args.warm_up, len(samples) - 1)]) if samples else None,
        "last": asdict(samples[-1]) if samples else None,
    }  # fmt: skip
    rows = [
        ("changes, requests beside them", f"{number}, {len(load.seconds)}"),
        ("longest pause", f"{values['longest_pause_ms']:.2f} ms"),
        ("verdict", verdict),
    ]
    return rows, values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between the starts of two changes, at least")
    parser.add_argument("--warm-up", type=int, default=2, help="samples, one each five changes, that don't count")
    parser.add_argument("--concurrency", type=int, default=2, help="requests of the load at a time")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("server_flags", nargs="*", help="after --: more flags for the instance")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, values = soak(make_models(Path(folder)), args)
    report("Repeated updates", args.output, rows, values)
    print(json.dumps(values))
    return 0 if values["verdict"] == "no growth" else 1


if __name__ == "__main__":
    sys.exit(main())
