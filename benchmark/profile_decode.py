"""What a server does while it decodes: its passes are recorded by /start_profile, and the trace is summed up.

    python benchmark/profile_decode.py [--device cuda] [--model-path FOLDER] [--concurrency 1,64] [--passes 40]

For each number of concurrent requests: the time of a pass, the GPU's busy share and its largest gap, the CUDA calls
that wait, apart those that wait for the tokens of a pass, the launches, and the kernels that take the most time. A
recorded pass is slower than others: every kernel of it is noted down. On a CPU only its operations are listed. The
model on a GPU is a random one in the shape of Qwen3-8B, on a CPU the demo model. The traces stay in the work folder,
for ui.perfetto.dev or chrome://tracing.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import gzip
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_common import RESULTS, ROOT, Server, report, running
from bench_gpu import SERVER_FLAGS, empty_gpu
from bench_serving import run_load
from decode_trace import Calls, DecodeSummary, summarize_decode
from gpu_model import SHAPE, make_model

WARM_UP_PASSES = 16  # recorded before those that count: the first are slow, and prompts may still come in
MAX_OUTPUT_LEN = 2048
TIMEOUT_S = 120.0
NAME_LEN = 80


def wait_for(what: str, condition: Callable[[], Any], poll_s: float = 0.02) -> Any:
    """The first true value of `condition`. Raises TimeoutError."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} after {TIMEOUT_S:g} s")
        time.sleep(poll_s)
    return value


@contextlib.contextmanager
def decoding(server: Server, count: int, input_len: int, vocab_size: int) -> Iterator[None]:
    """`count` requests that decode, with others behind them, for the length of a with block."""
    output_len = min(MAX_OUTPUT_LEN, server.call("/get_server_info")["max_req_len"] - input_len - 1)
    load = argparse.Namespace(
        seed=count, num_requests=4 * count, concurrency=count, input_len=input_len, output_len=output_len,
        shared_prefix_len=0, vocab_size=vocab_size, abort_share=0.0, request_rate=float("inf"),
    )  # fmt: skip
    loop = asyncio.new_event_loop()
    task = loop.create_task(run_load(server.url, load))

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_for(f"not all of {count} requests run", lambda: num_running(server) == count)
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()
        wait_for("requests still run", lambda: num_running(server) == 0)


def num_running(server: Server) -> int:
    return sum(state["num_running_reqs"] for state in server.call("/get_server_info")["internal_states"])


def profile(server: Server, folder: Path, count: int, args: argparse.Namespace, vocab_size: int) -> DecodeSummary:
    """Record decode passes of `count` requests into the folder, and sum them up."""
    shutil.rmtree(folder, ignore_errors=True)
    with decoding(server, count, args.input_len, vocab_size):
        num_steps = args.passes + 1 + WARM_UP_PASSES
        server.call("/start_profile", {"output_dir": str(folder.resolve()), "num_steps": num_steps})
        trace = wait_for("no trace", lambda: next(folder.glob("*-rank-0.trace.json.gz"), None))
    with gzip.open(trace) as file:
        return summarize_decode(json.load(file)["traceEvents"], args.passes)


def to_rows(count: int, summary: DecodeSummary) -> list[tuple[str, str]]:
    """The summary for people."""

    def words(waits: list[Calls]) -> str:
        each = (f"{w.per_pass:.2f} {w.name}, {w.mean_us:.0f} µs each, at most {w.max_us:.0f}" for w in waits)
        return "; ".join(each) or "none"

    rows = [
        (f"{count} concurrent", f"{summary.num_passes} passes of {summary.batch_size}, {summary.pass_ms:.3f} ms each")
    ]
    if summary.has_gpu:
        launches = f"{summary.kernel_launches:.1f} kernels, {summary.graph_launches:.1f} graphs"
        rows += [
            ("GPU busy", f"{summary.gpu_busy:.1%}; largest gap {summary.largest_gap_us:.1f} µs"),
            ("waits for a pass's tokens, per pass", words(summary.result_waits)),
            ("other waits, per pass", words(summary.other_waits)),
            ("launches per pass", f"{launches}, {summary.launch_us:.0f} µs of the host"),
        ]
    rows += [
        (f"{'kernel' if summary.has_gpu else 'operation'} {place}",
         f"{one.share:6.1%}  {one.us_per_pass:9.1f} µs per pass  {one.name[:NAME_LEN]}")
        for place, one in enumerate(summary.kernels or summary.cpu_ops, 1)
    ]  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, help="model folder; when not given, see above")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="a GPU if there is one, when not given")
    parser.add_argument("--work-dir", type=Path, default=RESULTS, help="for the traces, and for the random model")
    parser.add_argument("--concurrency", default="1,64", help="numbers of requests, one run for each")
    parser.add_argument("--passes", type=int, default=40, help="decode passes to look at")
    parser.add_argument("--input-len", type=int, default=128, help="tokens")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("server_flags", nargs="*", help="after --: more flags for the server")
    args = parser.parse_args()
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.model_path is not None:
        folder = args.model_path
    elif device == "cuda":
        folder = make_model(args.work_dir / "model-8b", SHAPE)
        empty_gpu()
    else:
        folder = ROOT / "examples" / "demo_model"
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    flags = SERVER_FLAGS if device == "cuda" else []
    rows, values = [], {}
    with running(
        folder, "--device", device, "--profile-dir", str(args.work_dir.resolve()), *flags, *args.server_flags
    ) as server:
        for count in map(int, args.concurrency.split(",")):
            summary = profile(server, args.work_dir / "profiles" / f"{count}-concurrent", count, args, vocab_size)
            rows += to_rows(count, summary)
            values[str(count)] = dataclasses.asdict(summary)
    report("decode profile", args.output, rows, values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
