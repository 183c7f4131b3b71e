"""Clones a serving instance again and again while it is under load, and watches its memory.

    python benchmark/soak_clones.py [--minutes 3 | --clones N] [--every 5] [--device cuda] [--model-path FOLDER]

Each clone takes the weights from the seed over the way that `--local-mode` allows, answers one question as the seed
did before the load began, and ends. After each, the seed's processes are counted: memory of their own (RssAnon of
proc_pid_status(5)), open files, threads, and the memory in use on their GPU. Exit code 1 if one of these has grown
beyond its bound since the first clones, a clone has answered wrongly, has read files, or a request of the load failed.
On several GPUs the clones run on the last one. `--without-engine` only loads the weights, in this process, and so makes
several clones in a second.
"""

import argparse
import functools
import http.client
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_common import ROOT, Server, percentile, report
from ramet.srt.model_loader.arena.allocate import allocate_arena

DEMO_MODEL = ROOT / "examples" / "demo_model"
SERVER_FLAGS = ["--max-total-tokens", "16384", "--max-running-requests", "32"]
OFFER = "--remote-instance-weight-loader-start-seed-via-transfer-engine"
QUESTION = {"input_ids": [5, 6, 7, 8], "sampling_params": {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}}
LOAD = {"input_ids": list(range(10, 74)), "sampling_params": {"temperature": 0.8, "max_new_tokens": 48,
                                                              "ignore_eos": True}}  # fmt: skip


@dataclass
class Sample:
    """What the seed holds."""

    host_bytes: int
    num_files: int
    num_threads: int
    gpu_bytes: int  # 0 without a GPU


# Growth that is allowed in a whole run: heaps grow a little under load, and connections of the load come and go.
BOUNDS = Sample(host_bytes=64 << 20, num_files=8, num_threads=8, gpu_bytes=64 << 20)


def process_tree(root: int) -> list[int]:
    """A process and all its descendants."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    tree = [root]
    for process in tree:
        tree += [child for child, parent in parents.items() if parent == process]
    return tree


def take_sample(root: int, gpu: int | None) -> Sample:
    host = files = threads = 0
    for process in process_tree(root):
        try:
            status = Path(f"/proc/{process}/status").read_text()
            num_files = len(list(Path(f"/proc/{process}/fd").iterdir()))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        values = dict(re.findall(r"^(RssAnon|Threads):\s+(\d+)", status, re.M))
        if "RssAnon" not in values:
            continue  # it has ended, and its parent does not know yet
        host += int(values["RssAnon"]) << 10
        threads += int(values["Threads"])
        files += num_files
    return Sample(host, files, threads, 0 if gpu is None else used_gpu_bytes(gpu))


def used_gpu_bytes(gpu: int) -> int:
    command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout) << 20


def count_gpus() -> int:
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True, timeout=30)
    return len(listed.stdout.splitlines())


class Load:
    """Requests to the seed, always `concurrency` of them. Use as a context manager."""

    def __init__(self, seed: Server, concurrency: int) -> None:
        self.seconds: list[float] = []
        self.errors: list[str] = []
        self._seed = seed
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(concurrency)]

    def _run(self) -> None:
        while not self._stop.is_set() and len(self.errors) < 10:
            start = time.perf_counter()
            try:
                answer = self._seed.call("/generate", LOAD, timeout_s=60)
                if len(answer["output_ids"]) != LOAD["sampling_params"]["max_new_tokens"]:  # type: ignore[index]
                    self.errors.append(f"an answer of {len(answer['output_ids'])} tokens")
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.errors.append(repr(error))
            self.seconds.append(time.perf_counter() - start)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(70)


def clone_once(folder: Path, flags: list[str]) -> dict[str, Any]:
    """Start a clone, ask it, end it."""
    start = time.monotonic()
    clone = Server(folder, *flags, timeout_s=120)
    try:
        answer = clone.call("/generate", QUESTION)["output_ids"]
        seconds = time.monotonic() - start
        load = clone.rank_info()["load_report"]
    finally:
        clone.stop()
    return {"first_answer_s": seconds, "answer": answer, "source": load["source"], "verified": load["verified"]}


class WeightClones:
    """Takes the weights of a seed's only rank, again and again, into one arena; compares them by their checksums."""

    def __init__(self, seed: Server, device: str, local_mode: str) -> None:
        from ramet.srt.configs.load_config import LoadConfig
        from ramet.srt.model_loader.loader import get_model_loader
        from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedServer, fetch_seed_answer
        from ramet.srt.utils.net import SeedAddress

        if device != "cpu":
            import torch

            torch.cuda.set_device(device)
        manifest = fetch_seed_answer(SeedServer(SeedAddress("127.0.0.1", seed.port)), 0, "target", 30.0).manifest
        assert manifest is not None
        self._manifest = manifest
        self._arena = allocate_arena(manifest, device)
        config = LoadConfig(load_format="remote_instance", seeds=(SeedAddress("127.0.0.1", seed.port),),
                            local_mode=local_mode, fallback="error")  # fmt: skip
        self._make_loader = lambda: get_model_loader(config)

    def take(self, expected: list[int]) -> dict[str, Any]:
        """Load once; nothing is asked, so the answer is the expected one."""
        start = time.monotonic()
        load = self._make_loader().load_weights(self._manifest, self._arena, "/nonexistent").report
        return {"first_answer_s": time.monotonic() - start, "answer": expected, "source": load.source,
                "verified": load.verified}  # fmt: skip


def find_faults(expected: list[int], clones: list[dict], samples: list[Sample], load: Load, warm_up: int) -> list[str]:
    """What is wrong, one line each."""
    faults = [f"clone {i}: other tokens than the seed's" for i, c in enumerate(clones) if c["answer"] != expected]
    faults += [f"clone {i}: from {c['source']}, verified: {c['verified']}" for i, c in enumerate(clones)
               if c["source"] == "checkpoint" or not c["verified"]]  # fmt: skip
    faults += [f"load: {error}" for error in load.errors[:3]]
    if not load.seconds:
        faults.append("load: no request has ended")
    if len(samples) <= warm_up:
        return [*faults, f"only {len(samples)} clones: nothing can be said about growth"]
    before, last = asdict(samples[warm_up - 1]), [asdict(sample) for sample in samples[warm_up:][-3:]]
    for name, bound in asdict(BOUNDS).items():
        grown = statistics.median_low([sample[name] for sample in last]) - before[name]
        if grown > bound:
            faults.append(f"{name} has grown by {grown} since clone {warm_up}; {bound} is allowed")
    return faults


def print_progress(number: int, clone: dict[str, Any], sample: Sample) -> None:
    host, gpu = sample.host_bytes / 2**20, sample.gpu_bytes / 2**20
    print(f"clone {number}: {clone['source']}, {clone['first_answer_s']:.2f} s; the seed: {host:.1f} MiB, "
          f"GPU {gpu:.0f} MiB, {sample.num_files} files, {sample.num_threads} threads", flush=True)  # fmt: skip


def describe_clones(clones: list[dict[str, Any]], samples: list[Sample], warm_up: int) -> list[tuple[str, str]]:
    """Rows of the result, of one clone or more."""
    seconds = [clone["first_answer_s"] for clone in clones]
    first, last = asdict(samples[min(warm_up, len(samples)) - 1]), asdict(samples[-1])
    return [
        ("clones", f"{len(clones)}, from {', '.join(sorted({clone['source'] for clone in clones}))}"),
        ("start to first answer", f"median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s"),
        (f"growth since clone {warm_up}", ", ".join(f"{name} {last[name] - first[name]:+d}" for name in first)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--clones", type=int, default=10**6, help="end after so many, if the time is not over sooner")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between the starts of two clones, at least")
    parser.add_argument("--warm-up", type=int, default=3, help="clones after which memory may not grow any more")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model-path", type=Path, default=DEMO_MODEL)
    parser.add_argument("--local-mode", choices=("auto", "copy", "off"), default="auto")
    parser.add_argument("--concurrency", type=int, default=8, help="requests of the load at a time")
    parser.add_argument("--without-engine", action="store_true", help="only take the weights")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    gpu = 0 if args.device == "cuda" else None
    flags = ["--device", args.device, *SERVER_FLAGS]
    prefix = "--remote-instance-weight-loader"
    samples: list[Sample] = []
    clones: list[dict[str, Any]] = []
    seed = Server(args.model_path, *flags, OFFER)
    try:
        expected = seed.call("/generate", QUESTION)["output_ids"]
        clone_flags = [*flags, "--load-format", "remote_instance", f"{prefix}-seed-instance-ip",
                       f"127.0.0.1:{seed.port}", f"{prefix}-local-mode", args.local_mode]  # fmt: skip
        if gpu is not None:
            clone_flags += ["--base-gpu-id", str(count_gpus() - 1)]
        make_clone = functools.partial(clone_once, args.model_path, clone_flags)
        if args.without_engine:
            device = args.device if gpu is None else f"cuda:{count_gpus() - 1}"
            make_clone = functools.partial(WeightClones(seed, device, args.local_mode).take, expected)
        end = time.monotonic() + 60 * args.minutes
        with Load(seed, args.concurrency) as load:
            while time.monotonic() < end and len(clones) < args.clones:
                start = time.monotonic()
                clones.append(make_clone())
                samples.append(take_sample(seed.process.pid, gpu))
                print_progress(len(clones), clones[-1], samples[-1])
                time.sleep(max(0.0, min(end, start + args.every) - time.monotonic()))
        after = seed.call("/generate", QUESTION)["output_ids"]
    finally:
        seed.stop()
    faults = find_faults(expected, clones, samples, load, args.warm_up)
    if after != expected:
        faults.append("the seed answers otherwise than before")
    rows = describe_clones(clones, samples, args.warm_up) if clones else [("clones", "0")]
    rows += [
        ("requests of the load", f"{len(load.seconds)}, p99 {percentile(load.seconds, 0.99):.2f} s"),
        ("faults", "; ".join(faults) or "none"),
    ]
    values = {"clones": clones, "samples": [asdict(sample) for sample in samples], "faults": faults}
    report(f"Repeated clones on {args.device}", args.output, rows, values)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
