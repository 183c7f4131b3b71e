"""Prints how long one instance on a GPU takes to sleep and to wake, and how much of the GPU's memory it gives back.

    python test/manual/sleep_timings.py --model-path FOLDER [--peer] [--rounds 5]

Each round sleeps and wakes from the files (which are in the page cache from the second on), then with a copy in host
memory, then, with --peer, from a second instance of the same model, which runs on the next GPU if there are two. A wake
ends with the first token of a request that waited for it. No limits are checked.
"""

import argparse
import contextlib
import statistics
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "python")]

import torch  # noqa: E402 - made importable above
from bench_common import Server, running  # noqa: E402

QUESTION = {"input_ids": [5, 6, 7], "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}}


def free_gb() -> float:
    return torch.cuda.mem_get_info(0)[0] / 1e9


def measure(server: Server, sleep_path: str, wake_body: dict[str, str]) -> tuple[float, float, float, float]:
    """Seconds to sleep, GB that come free, seconds to wake, and to the first token."""
    before = free_gb()
    start = time.perf_counter()
    server.call(sleep_path, {})
    asleep_s, given_gb = time.perf_counter() - start, free_gb() - before
    times: list[float] = []

    def ask() -> None:
        server.call("/generate", QUESTION)
        times.append(time.perf_counter())

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.5)
    start = time.perf_counter()
    server.call("/resume_memory_occupation", wake_body)
    awake_s = time.perf_counter() - start
    asking.join()
    return asleep_s, given_gb, awake_s, times[0] - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    total = torch.cuda.mem_get_info(0)[1] / 1e9
    idle = free_gb()
    fraction = "0.4" if args.peer and torch.cuda.device_count() == 1 else "0.85"
    flags = ["--device", "cuda", "--mem-fraction-static", fraction, "--enable-memory-saver",
             "--remote-instance-weight-loader-start-seed-via-transfer-engine"]  # fmt: skip
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(args.model_path, *flags))
        held = idle - free_gb()
        print(f"GPU of {total:.1f} GB; the instance holds {held:.2f} GB")
        ways = {"files": ("/release_memory_occupation", {}), "host memory": ("/sleep?level=1&mode=keep", {})}
        if args.peer:
            other = ["--base-gpu-id", "1"] if torch.cuda.device_count() > 1 else []
            peer = stack.enter_context(running(args.model_path, *flags, *other))
            ways["peer"] = ("/release_memory_occupation", {"address": f"127.0.0.1:{peer.port}"})
        for name, (path, body) in ways.items():
            rounds = [measure(server, path, body) for _ in range(args.rounds)]
            asleep, given, awake, first = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(
                f"{name:12} sleep {asleep:.3f} s, gives back {given:.2f} GB ({given / held:.1%}), wake {awake:.3f} s, "
                f"wake to first token {first:.3f} s (first round: sleep {rounds[0][0]:.3f}, token {rounds[0][3]:.3f})"
            )
        print(server.log_path.read_text()[-2000:])


if __name__ == "__main__":
    main()
