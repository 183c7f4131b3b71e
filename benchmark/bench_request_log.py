"""What --log-requests costs: chat completions per second with it and without, in turns, without the model.

    python benchmark/bench_request_log.py [--pairs 9] [--seconds 5] [--concurrency 64] [--level 0] [--format text]

Two servers with the tests' fake scheduler, as in bench_http.py, answer wrk in turns, so that what else the machine does
meets both. The median of the ratios of neighbouring runs counts. Where other processes want the cores, too, the time on
a core that the servers' main processes take for a request says more than the rate.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_common import ROOT, Server, make_parser, report
from bench_http import SERVER_FLAGS, check, measure, request_body


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="runs with and without it")
    parser.add_argument("--seconds", type=int, default=5, help="of each run")
    parser.add_argument("--concurrency", type=int, default=64, help="connections, each with one request at a time")
    parser.add_argument("--input-words", type=int, default=64, help="words of the message")
    parser.add_argument("--output-len", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--level", type=int, default=0, help="of --log-requests-level")
    parser.add_argument("--format", default="text", help="of --log-format")
    args = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed; it sends the requests (Debian: apt install wrk)")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "test"), os.environ.get("PYTHONPATH", "")])
    model = args.model_path or ROOT / "examples" / "demo_model"
    logging_flags = ["--log-requests", "--log-requests-level", str(args.level), "--log-format", args.format]
    rates: list[tuple[float, float]] = []
    costs: list[tuple[float, float]] = []
    with started(model, args.server_flags) as off, started(model, [*logging_flags, *args.server_flags]) as on:
        bodies = {server: request_body(server.url, args) for server in (off, on)}
        for server, body in bodies.items():
            check(server.url, body, args.output_len)
            measure(server.url, body, args.concurrency, 2)  # the first seconds are of another kind
        for number in range(args.pairs):
            order = (off, on) if number % 2 else (on, off)
            found = {server: run(server, bodies[server], args) for server in order}
            rates.append((found[off][0], found[on][0]))
            costs.append((found[off][1], found[on][1]))
    rows, values = [], {}
    for name, scale, unit, pairs in (("requests/s", 1, "", rates), ("core time of a request", 1e6, " us", costs)):
        ratio = statistics.median(on / off for off, on in pairs)
        without, within = (statistics.median(column) * scale for column in zip(*pairs, strict=True))
        rows.append((name, f"{without:.0f}{unit} without, {within:.0f}{unit} with; ratio {ratio:.3f}"))
        values[name] = {"ratio": ratio, "runs": pairs}
    report(f"--log-requests, level {args.level}, {args.format}", args.output, rows, values)


def run(server: Server, body: dict[str, Any], args: argparse.Namespace) -> tuple[float, float]:
    """Requests per second, and seconds on a core that the main process took for each of them."""
    before = core_seconds(server.process.pid)
    rate = measure(server.url, body, args.concurrency, args.seconds)[0]
    return rate, (core_seconds(server.process.pid) - before) / (rate * args.seconds)


def core_seconds(pid: int) -> float:
    """That a process has had. Source: proc(5), `utime` and `stime`."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def started(model: Path, flags: list[str]) -> Iterator[Server]:
    """A server without a model, whose log goes to a file."""
    server = Server(model, *SERVER_FLAGS, "--log-level", "info", *flags, module="launch_with_fake_scheduler")
    try:
        yield server
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
