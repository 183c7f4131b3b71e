"""Keeps one instance busy with everything at once for a long time, and watches that nothing fails and nothing grows.

    python benchmark/soak.py [--minutes 20] [--concurrency 6] [--device cpu] [--model-path FOLDER]

Whole and streamed answers, clients that leave, aborts, constrained output with ever new schemas, shared prefixes, a
cache that is flushed again and again, requests that must be refused, and clones that take the weights and are asked.
Half-way the scheduler is killed and the instance started anew. No request may fail but those that this cuts. After a
fifth of each life, no process may grow beyond its bounds (memory of its own, open files, threads), nor the folder for
temporary files. Prints a verdict; exit code 1 on failure. benchmark/soak_clones.py is about clones alone, on GPUs too.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_common import Server, report
from soak_clones import DEMO_MODEL, OFFER, QUESTION, SERVER_FLAGS, clone_once, process_tree

BOUNDS = {"rss_bytes": 64 << 20, "files": 12, "threads": 8}  # growth of one process that is allowed
MAX_NEW_TEMPORARY = 4  # of the clone that is running
SAMPLE_PERIOD_S = 2.0
WARM_UP_SHARE = 0.2  # of a life
VOCAB = range(10, 200)


@dataclass
class Sample:
    """Each process of the instance by its name, and the number of temporary files."""

    processes: dict[str, dict[str, int]]
    temporary: int


def take_sample(root: int, folder: Path) -> Sample:
    processes = {}
    for pid in process_tree(root):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            module = [
                word for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0") if word.startswith("ramet.")
            ]
            values = dict(re.findall(r"^(RssAnon|Threads):\s+(\d+)", status, re.M))
            if module and "RssAnon" in values:
                files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
                name = f"{module[0].rpartition('.')[2]} {pid}"
                processes[name] = {"rss_bytes": int(values["RssAnon"]) << 10, "files": files,
                                   "threads": int(values["Threads"])}  # fmt: skip
    return Sample(processes, len(list(folder.iterdir())))


def find_growth(samples: list[Sample]) -> list[str]:
    """What has grown in one life of the instance, a line each."""
    warm = round(WARM_UP_SHARE * len(samples))
    if len(samples) - warm < 4:
        return [f"only {len(samples)} samples of a life: nothing can be said about growth"]
    first, last = samples[warm], samples[-3:]
    faults = []
    for name, before in first.processes.items():
        for what, bound in BOUNDS.items():
            grown = statistics.median(one.processes.get(name, before)[what] for one in last) - before[what]
            if grown > bound:
                faults.append(f"{name}: {what} has grown by {grown:.0f}; {bound} is allowed")
    if min(one.temporary for one in last) > first.temporary + MAX_NEW_TEMPORARY:
        faults.append(f"{last[-1].temporary} temporary files; there were {first.temporary}")
    return faults


class Failure(Exception):
    """A request did not end as it had to."""


class Client:
    """Sends requests of all kinds to whichever instance runs. The kinds are its methods in KINDS."""

    def __init__(self, seed: int, url: Callable[[], str]):
        self._random = random.Random(seed)
        self._url = url
        self._count = 0

    def send(self) -> str:
        """One request of a random kind; its name. Raises Failure, OSError or HTTPException."""
        self._count += 1
        kind = self._random.choice(KINDS)
        getattr(self, kind)()
        return kind

    def whole(self) -> None:
        answer = self._post("/generate", self._body(24))
        self._check(len(answer["output_ids"]) == 24, f"{len(answer['output_ids'])} tokens instead of 24")

    def streamed(self) -> None:
        with self._open("/generate", {**self._body(24), "stream": True}) as response:
            lines = [line for line in response if line.startswith(b"data: ")]
        self._check(lines[-1].strip() == b"data: [DONE]", "a stream without an end")
        last = json.loads(lines[-2].removeprefix(b"data: "))
        self._check(last.get("meta_info", {}).get("completion_tokens") == 24, f"a stream that ends with {last}")

    def leaves(self) -> None:
        with self._open("/generate", {**self._body(400), "stream": True}) as response:
            for _ in range(self._random.randrange(1, 6)):
                response.readline()

    def aborted(self) -> None:
        rid = f"soak-{id(self)}-{self._count}"
        timer = threading.Timer(0.05, lambda: self._post("/abort_request", {"rid": rid}))
        timer.start()
        try:
            self._post("/generate", {**self._body(200), "rid": rid})
        finally:
            timer.join()

    def constrained(self) -> None:
        name = f"field_{self._random.randrange(10_000)}"
        schema = {"type": "object", "properties": {name: {"enum": ["a", "b"]}}, "required": [name],
                  "additionalProperties": False}  # fmt: skip
        params = {"max_new_tokens": 120, "temperature": 0.8, "json_schema": json.dumps(schema)}
        answer = self._post("/generate", {"input_ids": self._ids(8), "sampling_params": params})
        if answer["meta_info"]["finish_reason"]["type"] == "stop":
            self._check(list(json.loads(answer["text"])) == [name], f"an answer outside its schema: {answer['text']!r}")

    def shares_prefix(self) -> None:
        self._post("/generate", {**self._body(4), "input_ids": [*range(20, 148), *self._ids(8)]})

    def flushes(self) -> None:
        with contextlib.suppress(urllib.error.HTTPError):  # it is refused while something runs
            self._open("/flush_cache", {}).close()

    def refused(self) -> None:
        try:
            self._open("/generate", {"input_ids": [1], "sampling_params": {"temperature": -1}}).close()
        except urllib.error.HTTPError as error:
            self._check(error.code == 400, f"status {error.code} where 400 is right")
        else:
            raise Failure("a wrong request was served")

    def _ids(self, count: int) -> list[int]:
        return self._random.choices(VOCAB, k=count)

    def _body(self, num_tokens: int) -> dict[str, Any]:
        params = {"max_new_tokens": num_tokens, "temperature": 0.8, "ignore_eos": True}
        return {"input_ids": self._ids(self._random.randrange(2, 100)), "sampling_params": params}

    def _open(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url() + path, json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request, timeout=120)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        with self._open(path, body) as response:
            return json.loads(response.read() or b"null")

    @staticmethod
    def _check(is_right: bool, what: str) -> None:
        if not is_right:
            raise Failure(what)


KINDS = ("whole", "streamed", "leaves", "aborted", "constrained", "shares_prefix", "flushes", "refused")


class Soak:
    """The instance, its load and what was seen."""

    def __init__(self, model: Path, flags: list[str], folder: Path):
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.samples: list[Sample] = []  # of this life
        self.num_clones = 0
        self._model, self._flags, self._folder = model, flags, folder
        self._outages = 0  # how many have begun or ended: odd while there is one
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self.server = Server(self._model, *self._flags, OFFER)
        self._expected = self.server.call("/generate", QUESTION)["output_ids"]

    def run(self, seconds: float, concurrency: int) -> None:
        """Two lives of half the time each."""
        threads = [threading.Thread(target=self._load, args=(number,)) for number in range(concurrency)]
        threads += [threading.Thread(target=target) for target in (self._watch, self._clone)]
        for thread in threads:
            thread.start()
        try:
            self._stop.wait(seconds / 2)
            self._kill_and_restart()
            self._stop.wait(seconds / 2)
            self.faults += find_growth(self.samples)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(150)
            self.server.stop()
        if self.server.process.returncode != 0:
            self.faults.append(f"the instance ended with {self.server.process.returncode}")
        if left := [path.name for path in self._folder.iterdir()]:
            self.faults.append(f"left in the folder for temporary files: {left}")

    def _kill_and_restart(self) -> None:
        self.faults += find_growth(self.samples)
        self._outages += 1
        for pid in process_tree(self.server.process.pid):
            if b"scheduler_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        if (code := self.server.process.wait(30)) != 1:
            self.faults.append(f"a killed scheduler has ended the instance with {code}")
        if "Traceback" in self.server.log_path.read_text():
            self.faults.append(f"a traceback in {self.server.log_path}")
        self.samples = []
        self._start()
        self._outages += 1

    def _load(self, number: int) -> None:
        client = Client(number, lambda: self.server.url)
        while not self._stop.is_set():
            outages = self._outages
            if outages % 2:
                self._stop.wait(0.1)
                continue
            try:
                kind = client.send()
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, Failure) as error:
                kind = "cut"
                if outages == self._outages and len(self.faults) < 20:
                    self.faults.append(f"a request failed: {error!r}")
            with self._lock:
                self.counts[kind] += 1

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_PERIOD_S):
            if self._outages % 2 == 0:
                self.samples.append(take_sample(self.server.process.pid, self._folder))

    def _clone(self) -> None:
        prefix = "--remote-instance-weight-loader"
        while not self._stop.is_set():
            outages = self._outages
            if outages % 2 == 0:
                flags = [*self._flags, "--load-format", "remote_instance"]
                flags += [f"{prefix}-seed-instance-ip", f"127.0.0.1:{self.server.port}"]
                try:
                    clone = clone_once(self._model, flags)
                except (OSError, RuntimeError) as error:
                    clone = {"error": error}
                if outages == self._outages:
                    self.num_clones += 1
                    if clone.get("answer") != self._expected or clone["source"] == "checkpoint":
                        self.faults.append(f"a clone: {clone}")
            self._stop.wait(1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--concurrency", type=int, default=6, help="requests at a time")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--model-path", type=Path, default=DEMO_MODEL)
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        os.environ["TMPDIR"] = temporary
        soak = Soak(args.model_path, ["--device", args.device, *SERVER_FLAGS], Path(temporary))
        soak.run(60 * args.minutes, args.concurrency)
    last = soak.samples[-1].processes if soak.samples else {}
    faults = [*soak.faults, *(f"no request of the kind {kind}" for kind in KINDS if not soak.counts[kind])]
    rows = [
        ("requests", ", ".join(f"{kind} {count}" for kind, count in sorted(soak.counts.items()))),
        ("clones", f"{soak.num_clones}"),
        *((name, ", ".join(f"{what} {value}" for what, value in one.items())) for name, one in last.items()),
        ("faults", "; ".join(faults) or "none"),
        ("verdict", "failed" if faults else "nothing failed, nothing has grown"),
    ]
    report(f"Soak of {args.minutes:g} minutes on {args.device}", args.output, rows, {"faults": faults})
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
