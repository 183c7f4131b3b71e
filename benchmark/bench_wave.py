"""A fleet of small instances changes its weights in waves while requests run: who is ready meanwhile, and what fails.

    python benchmark/bench_wave.py [--instances 8] [--min-serving 0.75] [--waves 3] [--clients 4]

A metadata server, real instances of a tiny model on this machine's CPU, and this process as their trainer. Each wave
publishes other weights and sets them as the fleet's target. Clients ask whichever instance says that it is ready, one
after the other, as a balancer does. Ends with 1 if a request has failed, fewer were ready than the share allows, or
an instance has answered with older weights than it had said that it was ready with.
"""
# ruff: noqa: E402 - the models are in the tests' folder, which has to be made importable first

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench_common import ROOT, report

sys.path.insert(0, str(ROOT / "test"))

import httpx
import random_models as rm
from modelexpress_harness import running_server
from published_weights import MODEL, make_models
from ramet.trainer import WeightPublisher
from safetensors.torch import load_file
from server_process import ServerProcess
from updated_servers import SMALL

WAVE_TIMEOUT_S = 300.0
LOOK_S = 0.1
QUIET_S = 10.0  # of load before the first wave
SAMPLING = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


@dataclass
class Seen:
    """What clients and the watcher have seen."""

    num_ready: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of answers
    failures: list[str] = field(default_factory=list)


class Load:
    """Requests to the instances that are ready. Use as a context; what `seen` is gets everything from then on."""

    def __init__(self, servers: list[ServerProcess], num_clients: int) -> None:
        self._urls = [server.url for server in servers]
        self._ready: list[str] = []
        self._newest = dict.fromkeys(self._urls, 0)  # number of the version with which each was last ready
        self._ending = threading.Event()
        self._turns = itertools.count()
        self.seen = Seen()
        self.numbers = {"default": 0}  # of versions, by name
        threads = [threading.Thread(target=self._ask) for _ in range(num_clients)]
        self._threads = [threading.Thread(target=self._watch), *threads]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def _watch(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self._ending.wait(LOOK_S):
                ready = []
                for url in self._urls:
                    if client.get(f"{url}/ready").status_code == 200:
                        ready.append(url)
                        version = client.get(f"{url}/model_info").json()["weight_version"]
                        if client.get(f"{url}/ready").status_code == 200:  # it was all the time, with that one
                            self._newest[url] = max(self._newest[url], self.numbers[version])
                self._ready = ready
                self.seen.num_ready.append(len(ready))

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._ending.is_set():
                ready = self._ready
                if not ready:
                    self._ending.wait(LOOK_S)
                    continue
                url = ready[next(self._turns) % len(ready)]
                least, begun = self._newest[url], time.perf_counter()
                try:
                    answer = client.post(f"{url}/generate", json={"input_ids": PROMPT, "sampling_params": SAMPLING})
                except httpx.HTTPError as error:
                    self.seen.failures.append(f"{url}: {error!r}")
                    continue
                self.seen.seconds.append(time.perf_counter() - begun)
                if answer.status_code != 200:
                    self.seen.failures.append(f"{url}: {answer.status_code} {answer.text[:200]}")
                elif self.numbers[version := answer.json()["meta_info"]["weight_version"]] < least:
                    self.seen.failures.append(f"{url}: answered by {version} after it was ready with a newer one")


PROMPT = rm.random_prompts([16])[0]


def has_all(servers: list[ServerProcess], version: str) -> bool:
    return all(
        httpx.get(f"{server.url}/model_info", timeout=30).json()["weight_version"] == version
        and httpx.get(f"{server.url}/ready", timeout=30).status_code == 200
        for server in servers
    )


def wave(servers: list[ServerProcess], http_url: str, version: str, min_serving: float) -> float:
    """Seconds from setting the target until all are ready with it."""
    begun = time.perf_counter()
    target = {"model": MODEL, "version": version, "min_serving": min_serving}
    httpx.post(f"{http_url}/fleet/targets", json=target, timeout=30).raise_for_status()
    while not has_all(servers, version):
        if time.perf_counter() - begun > WAVE_TIMEOUT_S:
            raise TimeoutError(f"not all serve {version} after {WAVE_TIMEOUT_S:g} s: "
                               f"{httpx.get(f'{http_url}/fleet/targets').text}")  # fmt: skip
        time.sleep(0.5)
    return time.perf_counter() - begun


def middle_and_p99(seen: Seen) -> str:
    ordered = sorted(seen.seconds)
    last = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)))]
    return f"{1e3 * statistics.median(ordered):.0f}, {1e3 * last:.0f} ms"


def run(args: argparse.Namespace, folder: Path) -> tuple[list[tuple[str, str]], dict[str, object], int]:
    models = make_models(folder)
    contents = [load_file(models[name] / "model.safetensors") for name in ("new", "old")]
    with running_server() as mx, ExitStack() as stack:
        settings = {"url": mx.address, "model_name": MODEL, "source": True, "wait_timeout": 60}
        flags = ("--modelexpress-config", json.dumps(settings), *SMALL)
        servers = [
            stack.enter_context(ServerProcess(models["old"], folder / f"log{number}", *flags, fake=False))
            for number in range(args.instances)
        ]
        for server in servers:
            server.wait_ready()
        publisher = stack.enter_context(WeightPublisher(contents[0], metadata=mx.address, model_name=MODEL))
        load = Load(servers, args.clients)
        with load:
            time.sleep(QUIET_S)
            quiet, load.seen = load.seen, Seen()
            seconds = []
            for number in range(args.waves):
                version = f"step-{number + 1}"
                load.numbers[version] = number + 1
                publisher.publish(version, contents[number % 2])
                seconds.append(wave(servers, mx.http_url, version, args.min_serving))
        seen = load.seen
    allowed = math.ceil(args.min_serving * args.instances)
    least = min(seen.num_ready)
    failures = quiet.failures + seen.failures
    rows = [
        (f"a wave over {args.instances} instances, set to all ready",
         ", ".join(f"{one:.1f}" for one in seconds) + f" s; {args.clients} clients"),
        ("fewest ready at any time", f"{least} of {args.instances}; at least {allowed} are to be"),
        ("requests answered, failed", f"{len(seen.seconds)}, {len(failures)}"),
        ("a request, before: p50, p99", middle_and_p99(quiet)),
        ("a request, in waves: p50, p99", middle_and_p99(seen)),
    ]  # fmt: skip
    values = {"waves_s": seconds, "least_ready": least, "allowed": allowed, "failures": failures,
              "in_waves": asdict(seen), "before": asdict(quiet)}  # fmt: skip
    return rows, values, int(bool(failures) or least < allowed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--min-serving", type=float, default=0.75, help="share that stays ready")
    parser.add_argument("--waves", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    if args.instances < 2 or args.waves < 1 or args.clients < 1 or not 0 <= args.min_serving <= 1:
        parser.error("two instances or more, a wave, a client, and a share between 0 and 1")
    with tempfile.TemporaryDirectory(prefix="ramet-wave-") as folder:
        rows, values, code = run(args, Path(folder))
    report("A fleet changes its weights", args.output, rows, values)
    for failure in dict.fromkeys(values["failures"]):  # type: ignore[call-overload]
        print(failure, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
