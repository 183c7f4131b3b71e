"""What the benchmarks share: the model, the servers, the machine's description, results as JSON. Measures nothing."""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".run" / "bench"
BENCH_MODEL = RESULTS / "model-0.5b"
MODEL_VOCAB = 151936
# Qwen2's smallest published shape: 494 million parameters with the tied head counted once.
MODEL_SHAPE = {
    "vocab_size": MODEL_VOCAB,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_window_layers": 24,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that every benchmark of a model has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, help="model folder; a random one of 0.5 B parameters when not given")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("server_flags", nargs="*", help="after --: more flags for the server")
    return parser


def bench_model(path: Path | None) -> Path:
    """`path`, or the random model of 0.5 B parameters in bfloat16, which is made when it isn't there."""
    if path is not None:
        return path
    if not (BENCH_MODEL / "tokenizer.json").is_file():
        print("making a random model of 0.5 B parameters", file=sys.stderr)
        sys.path.insert(0, str(ROOT / "test"))
        from random_models import make_model

        make_model(BENCH_MODEL, "qwen2", dtype="bfloat16", **MODEL_SHAPE)
    return BENCH_MODEL


def weights_nbytes(folder: Path) -> int:
    """Size of a model's safetensors files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def read_weights(folder: Path) -> None:
    """Read the weight files, so that the next reader finds them in the page cache."""
    buffer = bytearray(1 << 24)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def random_prompt(length: int, vocab_size: int, generator: random.Random) -> list[int]:
    """Random token ids; ids that a tokenizer may use for special tokens are left out."""
    return [generator.randrange(10, vocab_size) for _ in range(length)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A Ramet instance that a benchmark measures."""

    def __init__(
        self,
        model: Path,
        *flags: str,
        timeout_s: float = 300.0,
        poll_s: float = 0.01,
        module: str = "ramet.launch_server",
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        log_folder = RESULTS / "logs"
        log_folder.mkdir(parents=True, exist_ok=True)
        self.log_path = log_folder / f"server-{self.port}.log"
        command = [sys.executable, "-m", module, "--model-path", str(model), "--port", str(self.port)]
        command += ["--engine-info-bootstrap-port", "0", "--log-level", "warning", *flags]
        start = time.monotonic()
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"server ended with {self.process.returncode}:\n{self.log_path.read_text()[-2000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/health", timeout=5):
                break
            if time.monotonic() - start > timeout_s:
                self.stop()
                raise RuntimeError(f"server not ready after {timeout_s:g} s; log {self.log_path}")
            time.sleep(poll_s)
        self.ready_s = time.monotonic() - start  # launch to the first good /health

    def call(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 600.0) -> Any:
        """The JSON answer of a GET, or of a POST when there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)

    def rank_info(self) -> dict[str, Any]:
        """What rank 0 reported when it was ready: load_report and phases among it."""
        return self.call("/get_server_info")["ranks"][0]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)


@contextlib.contextmanager
def running(model: Path, *flags: str) -> Iterator[Server]:
    """A server for the length of a with block."""
    server = Server(model, *flags)
    try:
        yield server
    finally:
        server.stop()


class MetadataServer(NamedTuple):
    """A running metadata server."""

    address: str  # host:port of gRPC
    http_url: str
    pid: int


@contextlib.contextmanager
def running_metadata_server(folder: Path, *flags: str) -> Iterator[MetadataServer]:
    """A metadata server in a process of its own, which writes its log into `folder`."""
    log = folder / "metadata-server.log"
    command = [sys.executable, "-m", "ramet.modelexpress_server", "--port", "0", "--metrics-port", "0", *flags]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, cwd=ROOT)
    try:
        deadline = time.monotonic() + 30
        while not (match := re.search(r"gRPC on (\S+), fleet page on (\S+)/,", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the metadata server did not start: {log.read_text()}")
            time.sleep(0.02)
        yield MetadataServer(match[1], match[2], process.pid)
    finally:
        process.terminate()
        process.wait(20)


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lies (nearest rank); nan when there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def machine() -> dict[str, Any]:
    """Where a result was measured."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory_kib = int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text()).group(1))
    versions = {}
    for package in ("torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "cpu": cpu.group(1) if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_kib / 2**20),
        "python": platform.python_version(),
        **versions,
    }


def report(name: str, output: Path | None, rows: list[tuple[str, str]], values: dict[str, Any]) -> None:
    """Print the rows as a table, and write everything as JSON to `output` when there is one."""
    width = max(len(label) for label, _ in rows)
    print(f"\n{name}")
    for label, text in rows:
        print(f"  {label:<{width}}  {text}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        command = "python " + " ".join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
        result = {
            "name": name,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": command,
            "machine": machine(),
            "rows": rows,
            "values": values,
        }
        output.write_text(json.dumps(result, indent=2) + "\n")
