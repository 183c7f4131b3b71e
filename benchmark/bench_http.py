"""What HTTP costs without the model: chat completions per second and their p99, whole and streamed, 256 at a time.

    python benchmark/bench_http.py [--url http://127.0.0.1:30000] [--concurrency 256] [--seconds 10] [--repeats 3]

Without --url it starts Ramet with the tests' fake scheduler, which makes a token for each request in every step and
computes nothing. wrk (Debian's package wrk) sends the requests, each connection the next one when it has its answer; it
takes little of a core itself. --url drives any server that answers POST /v1/chat/completions and takes ignore_eos;
`benchmark/sglang_without_model.py` starts SGLang's with a scheduler like ours.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from typing import Any

from bench_common import ROOT, Server, make_parser, report

UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
SERVER_FLAGS = ["--device", "cpu", "--max-running-requests", "512", "--max-queued-requests", "4096"]
SCRIPT = """wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = [==[{body}]==]
"""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--url", help="of a running server; Ramet with a fake scheduler when not given")
    parser.add_argument("--concurrency", type=int, default=256, help="connections, each with one request at a time")
    parser.add_argument("--seconds", type=int, default=10, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each kind, of which the medians count")
    parser.add_argument("--input-words", type=int, default=64, help="words of the message")
    parser.add_argument("--output-len", type=int, default=32, help="tokens of an answer")
    args = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed; it sends the requests (Debian: apt install wrk)")
    with contextlib.nullcontext(args.url) if args.url else started(args) as url:
        url = url.rstrip("/")
        body = request_body(url, args)
        rows, values = [], {}
        for kind in ("whole", "streamed"):
            sent = body | ({"stream": True} if kind == "streamed" else {})
            check(url, sent, args.output_len)
            measure(url, sent, args.concurrency, 2)  # the first seconds are of another kind
            found = [measure(url, sent, args.concurrency, args.seconds) for _ in range(args.repeats)]
            rate, p50, p99 = (statistics.median(column) for column in zip(*found, strict=True))
            rows.append((kind, f"{rate:.0f} requests/s, p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms"))
            values[kind] = {"requests_per_s": rate, "p50_s": p50, "p99_s": p99, "runs": found}
    report(f"chat completions without the model, {args.concurrency} at a time", args.output, rows, values)


@contextlib.contextmanager
def started(args: argparse.Namespace) -> Iterator[str]:
    """A server without a model."""
    model = args.model_path or ROOT / "examples" / "demo_model"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "test"), os.environ.get("PYTHONPATH", "")])
    server = Server(model, *SERVER_FLAGS, *args.server_flags, module="launch_with_fake_scheduler")
    try:
        yield server.url
    finally:
        server.stop()


def request_body(url: str, args: argparse.Namespace) -> dict[str, Any]:
    with urllib.request.urlopen(url + "/v1/models", timeout=30) as answer:
        model = json.load(answer)["data"][0]["id"]
    text = " ".join(f"word{number % 10}" for number in range(args.input_words))
    fields = {"max_tokens": args.output_len, "temperature": 0, "ignore_eos": True}
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


def check(url: str, body: dict[str, Any], output_len: int) -> None:
    """One request by itself must be answered whole."""
    options = {"stream_options": {"include_usage": True}} if body.get("stream") else {}
    data = json.dumps(body | options).encode()
    request = urllib.request.Request(url + "/v1/chat/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read().decode()
    if body.get("stream"):
        *events, end = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert end == "[DONE]", end
        usage = json.loads(events[-1])["usage"]
    else:
        usage = json.loads(text)["usage"]
    assert usage["completion_tokens"] == output_len, usage


def measure(url: str, body: dict[str, Any], concurrency: int, seconds: int) -> tuple[float, float, float]:
    """(requests per second, p50 and p99 in seconds) of one run of wrk.

    Raises:
        RuntimeError: if any answer was not one of success, or none came.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(SCRIPT.format(body=json.dumps(body)))
        script.flush()
        command = ["wrk", "-t", "1", "-c", str(concurrency), "-d", f"{seconds}s", "--timeout", "60s", "--latency"]
        done = subprocess.run(
            [*command, "-s", script.name, url + "/v1/chat/completions"],
            capture_output=True,
            text=True,
            timeout=seconds + 120,
        )
    if done.returncode != 0 or re.search(r"Non-2xx|Socket errors", done.stdout):
        raise RuntimeError(f"wrk: {done.stdout}{done.stderr}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    parts = [re.search(rf"{percent}%\s+([\d.]+)(us|ms|s|m)\b", done.stdout) for percent in (50, 99)]
    if rate is None or None in parts or float(rate[1]) == 0:
        raise RuntimeError(f"wrk said nothing that can be read: {done.stdout}")
    p50, p99 = (float(part[1]) * UNITS_S[part[2]] for part in parts if part is not None)
    return float(rate[1]), p50, p99


if __name__ == "__main__":
    sys.exit(main())
