"""A standby: how long it takes to become a model, from a peer or from files, and until a parked port has answered.

    python benchmark/bench_standby.py [--device cpu] [--rounds 20] [--model-path FOLDER] [--other FOLDER] [-- flags]

A seed keeps serving the model. "kept" is a model that the standby has been before, from the seed; "new" is another
model with another shape each time (its context length), from files; "parked" is the first completion of one token
through `ramet park`. Each is timed by the client, from the request to the answer. Before
each "new" the standby's spare processes are waited for. Memory is that of the standby's processes after the rounds.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench_common import ROOT, free_port, make_parser, read_weights, report, running

READY_TIMEOUT_S = 300.0
DEMO_MODEL = ROOT / "examples" / "demo_model"


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON answer of a GET, or of a POST when there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=READY_TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error.code} {error.read().decode(errors='replace')[:500]}") from None


def wait_for(condition: Callable[[], Any], what: str) -> None:
    """Return when it has come true."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, RuntimeError):
            if condition():
                return
        time.sleep(0.02)
    raise RuntimeError(f"{what} has not come within {READY_TIMEOUT_S:g} s")


@contextlib.contextmanager
def started(log: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL and the process of a `ramet` command that serves a port."""
    port = free_port()
    command = [sys.executable, "-m", "ramet.cli", *arguments, "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and what came of it."""
    begun = time.perf_counter()
    outcome = work()
    return 1000 * (time.perf_counter() - begun), outcome


def memory_of(pid: int) -> int:
    """Bytes of a process and its children, what they share counted once."""
    total = 0
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if folder.name.isdigit():
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if pid in (parent, int(folder.name)):
                    text = (folder / "smaps_rollup").read_text()
                    total += sum(1024 * int(one) for one in re.findall(r"^Pss:\s+(\d+)", text, re.M))
    return total


def processor_s(pid: int) -> float:
    """Processor time of a process and its children so far."""
    total = 0
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if folder.name.isdigit():
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                if pid in (int(fields[1]), int(folder.name)):
                    total += int(fields[11]) + int(fields[12])
    return total / 100


class Rounds:
    """One standby, and what it is asked in each round."""

    def __init__(self, url: str, pid: int, seed: str, model: Path, other: Path):
        self.url, self.pid, self.seed, self.model, self.other = url, pid, seed, model, other
        self.results: dict[str, list[float]] = {}
        self.phases: dict[str, dict[str, float]] = {}

    def become(self, name: str, model: Path | None, **body: Any) -> dict[str, Any]:
        """Have it become a model, and note how long that took under `name`."""
        body = {"model_path": None if model is None else str(model), **body}
        milliseconds, outcome = timed(lambda: call(f"{self.url}/become", body))
        self.results.setdefault(name, []).append(milliseconds)
        self.phases[name] = outcome["phases_ms"]
        return outcome

    def wait_warm(self) -> None:
        """Until processes wait for a model."""
        wait_for(lambda: call(f"{self.url}/standby")["is_warm"], "a spare")
        time.sleep(0.2)

    def run(self, number: int) -> None:
        """One round: the same model from the seed, another one from files."""
        way = self.become("kept", self.model, source="instance", seed=self.seed)["way"]
        if number and way != "kept":
            raise RuntimeError(f"round {number}: the model was not kept but {way}")
        self.become("put down", None)
        self.wait_warm()
        outcome = self.become("new", self.other, source="files", context_length=256 + number)
        if outcome["way"] != "new":
            raise RuntimeError(f"round {number}: the other model was {outcome['way']}")
        self.become("put down", None)

    def measure_idle(self) -> float:
        """Share of a processor that the standby takes while nothing happens."""
        before, begun = processor_s(self.pid), time.monotonic()
        time.sleep(5.0)
        return (processor_s(self.pid) - before) / (time.monotonic() - begun)


def measure_parked(standby: str, model: Path, folder: Path, rounds: int) -> list[float]:
    """Milliseconds of first completions at a parked port."""
    found = []
    flags = ["park", str(model), "--standby", standby, "--idle-timeout", "0.3", "--log-level", "warning"]
    with started(folder / "park.log", *flags) as (url, _):
        wait_for(lambda: call(f"{url}/health"), "the parked port")
        body = {"model": str(model), "prompt": "The", "max_tokens": 1, "temperature": 0}
        for _ in range(rounds):
            wait_for(lambda: call(f"{standby}/standby")["state"] == "standby", "that it is parked")
            time.sleep(0.5)
            found.append(timed(lambda: call(f"{url}/v1/completions", body))[0])
    return found


def p95(values: list[float]) -> float:
    """Of few values the largest but 5 %."""
    return sorted(values)[max(0, -(-95 * len(values) // 100) - 1)]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--other", type=Path, help="folder of the other model; the same files when not given")
    args = parser.parse_args()
    model = args.model_path or DEMO_MODEL
    other = args.other or model
    read_weights(model)
    read_weights(other)
    flags = ["--device", args.device, *args.server_flags]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ramet-bench-")))
        gpu = [] if args.device == "cpu" else ["--mem-fraction-static", "0.3"]  # both may be on one GPU
        seed = stack.enter_context(
            running(model, "--remote-instance-weight-loader-start-seed-via-transfer-engine", *flags, *gpu)
        )
        log = folder / "standby.log"
        url, process = stack.enter_context(started(log, "standby", "--keep-models", "2", *flags, *gpu))
        rounds = Rounds(url, process.pid, f"127.0.0.1:{seed.port}", model, other)
        rounds.wait_warm()
        idle = rounds.measure_idle()
        idle_nbytes = memory_of(process.pid)
        sizes = []
        for number in range(args.rounds):
            rounds.run(number)
            rounds.wait_warm()
            sizes.append(memory_of(process.pid))
        rounds.results["kept"] = rounds.results["kept"][1:] or rounds.results["kept"]  # the first one is new
        rounds.results["parked"] = measure_parked(url, model, folder, args.rounds)
    rows = []
    for name, values in rounds.results.items():
        rows.append((f"{name}: median, p95 of {len(values)}", f"{median(values):.0f}, {p95(values):.0f} ms"))
    rows += [
        (f"{name}, {phase}", f"{value:.0f} ms")
        for name in ("kept", "new")
        for phase, value in rounds.phases[name].items()
    ]
    rows.append(("idle: processor, memory", f"{100 * idle:.1f} %, {idle_nbytes / 1e6:.0f} MB"))
    rows.append(
        (
            "memory after the second and the last round",
            f"{sizes[min(1, len(sizes) - 1)] / 1e6:.0f}, {sizes[-1] / 1e6:.0f} MB",
        )
    )
    values = {"milliseconds": rounds.results, "phases_ms": rounds.phases, "idle_share": idle, "nbytes": sizes}
    report("standby", args.output, rows, values)


if __name__ == "__main__":
    main()
