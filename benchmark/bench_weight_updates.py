"""What it costs an instance under load to change its weights: the pause between two tokens, the way there and back.

    python benchmark/bench_weight_updates.py [--model-path FOLDER] [--load-format dummy] [--source instance|disk]
    python benchmark/bench_weight_updates.py --device cpu --source disk     pauses beside memcpy, about 1 GB

Two instances of one model run on this host, on two GPUs if there are two. One serves `--concurrency` streams, and is
updated `--updates` times from the other, or from the model's files; every fourth update is rolled back. A gap is the
longest time between two tokens of any stream, from an update's request to its answer; beside it stand the gaps without
updates. The limit is a plain copy of the model's bytes, between the same devices, in the same run. Without --model-path
the model is random, in Qwen3-8B's shape on a GPU and of 1.0 GB on a CPU. With `--load-format dummy` no
weights are written, and the two instances have different ones. `--sleep` measures that, too. The last line is all of it
as JSON.
"""

import argparse
import contextlib
import functools
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench_common import RESULTS, Server, percentile, report, running
from completion_load import Load, Outcome, Prompts, done, together
from gpu_model import SHAPE, make_model, write_config, write_large_tokenizer

OFFER = "--remote-instance-weight-loader-start-seed-via-transfer-engine"
ON_CPU: dict[str, Any] = {  # 1.0 GB
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "eos_token_id": 2,
}  # fmt: skip
INPUT_LEN = 128
PAUSE_S = 0.5  # between two updates
WARM_UP_S = 2.0  # of the streams, before the first update
RATE_INPUT_LEN, RATE_OUTPUT_LEN = 512, 256
HOST_COPY_ROUNDS = 5


class Streams:
    """Streams that run beside what is measured, in a thread of its own. Use as a context manager."""

    def __init__(self, url: str, vocab_size: int, args: argparse.Namespace) -> None:
        self.outcomes: list[Outcome] = []
        self.begin_s = 0.0
        self._url = url
        prompts = Prompts(vocab_size, "updates")
        self._requests = together(prompts, [INPUT_LEN] * args.concurrency, args.output_len)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with Load(self._url) as load:
            self.begin_s = time.perf_counter()
            self.outcomes = load.run(self._requests)

    @property
    def run_on(self) -> bool:
        return self._thread.is_alive()

    def __enter__(self) -> "Streams":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.join(900)

    def longest_gap(self, start_s: float, end_s: float) -> float | None:
        """Between two tokens of one stream, of which some part lies between two times of perf_counter, if any does.

        The first token of a stream is behind a prompt: it ends no gap.
        """
        start_s, end_s = start_s - self.begin_s, end_s - self.begin_s
        gaps: list[float] = []
        for outcome in self.outcomes:
            pairs = zip(outcome.times, outcome.times[1:], strict=False)
            gaps += [later - earlier for earlier, later in pairs if later >= start_s and earlier <= end_s]
        return max(gaps, default=None)

    def gaps_outside(self, windows: list[tuple[float, float]]) -> list[float]:
        """All gaps that no window touches, once every stream has begun."""
        began = max((outcome.times[0] for outcome in self.outcomes if outcome.times), default=0.0)
        cuts = [(start - self.begin_s, end - self.begin_s) for start, end in windows]
        gaps = []
        for outcome in self.outcomes:
            for earlier, later in zip(outcome.times, outcome.times[1:], strict=False):
                if earlier >= began and not any(later >= start and earlier <= end for start, end in cuts):
                    gaps.append(later - earlier)
        return gaps


def choose_model(args: argparse.Namespace) -> Path:
    if args.model_path is not None:
        return args.model_path
    shape, name = (SHAPE, "8b") if args.device == "cuda" else (SHAPE | ON_CPU, "1gb")
    if args.load_format != "dummy":
        return make_model(args.work_dir / f"model-{name}", shape, args.device)
    folder = write_config(args.work_dir / f"shape-{name}", shape)
    if not (folder / "tokenizer.json").is_file():
        write_large_tokenizer(folder, shape["vocab_size"])
    return folder


def count_gpus(device: str) -> int:
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def plain_copy_rate(device: str, num_gpus: int, nbytes: int) -> float:
    """Bytes copied in a second, to memory that has been touched, between the devices of both instances."""
    import torch
    from gpu_timing import time_on

    on = [torch.device("cpu")] * 2 if device == "cpu" else [torch.device("cuda", i) for i in (num_gpus - 1, 0)]
    source = torch.ones(nbytes, dtype=torch.uint8, device=on[0])
    target = torch.zeros(nbytes, dtype=torch.uint8, device=on[1])
    copy = functools.partial(target.copy_, source)
    seconds = statistics.median(time_on(on[1], copy, HOST_COPY_ROUNDS))
    del copy, source, target
    if device != "cpu":
        for index in range(num_gpus):
            with torch.cuda.device(index):
                torch.cuda.empty_cache()
    return nbytes / seconds


def ask_rate(server: Server, vocab_size: int, args: argparse.Namespace) -> float:
    """Output tokens per second of that many requests at once; the better of two rounds."""
    rates = []
    with Load(server.url) as load:
        for number in range(2):
            lens = [min(RATE_INPUT_LEN, args.rate_len * 2)] * args.concurrency
            start = time.perf_counter()
            outcomes = load.run(together(Prompts(vocab_size, f"rate {number}"), lens, args.rate_len))
            rates.append(sum(one.num_tokens for one in done(outcomes)) / (time.perf_counter() - start))
    return max(rates)


def change_weights(server: Server, peer: Server | None, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Update again and again beside streams; what came of it."""
    body = {"model_path": str(folder)} if peer is None else {"address": f"127.0.0.1:{peer.port}"}
    path = "/update_weights_from_disk" if peer is None else "/update_weights_from_instance"
    calls: list[dict[str, Any]] = []

    def call(name: str, path: str, body: dict[str, Any]) -> None:
        start = time.perf_counter()
        answer = server.call(path, body)
        calls.append({"name": name, "start": start, "end": time.perf_counter(), "has_load": streams.run_on, **answer})
        time.sleep(args.pause)

    with Streams(server.url, vocab_size_of(folder), args) as streams:
        time.sleep(args.warm_up)
        for number in range(args.updates):
            call("update", path, {**body, "weight_version": f"step-{number}"})
            if number % 4 == 3:
                call("rollback", "/rollback_weights", {})
    failed = [outcome.error for outcome in streams.outcomes if outcome.error]
    if failed:
        raise RuntimeError(f"{len(failed)} streams have failed: {failed[0]}")
    for one in calls:
        one["gap_s"] = streams.longest_gap(one["start"], one["end"]) if one["has_load"] else None
    quiet = streams.gaps_outside([(one["start"], one["end"]) for one in calls])
    return {"calls": calls, "quiet_gaps_ms": cuts_of(quiet, 1e3)}


def cuts_of(values: list[float], factor: float = 1.0) -> dict[str, float | None]:
    """Percentiles; None where there are no values."""
    return {
        name: factor * percentile(values, share) if values else None for name, share in (("p50", 0.5), ("p99", 0.99))
    }


def vocab_size_of(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def describe(calls: list[dict[str, Any]], copy_rate: float) -> dict[str, Any]:
    """The figures of all calls of one kind."""
    gaps = [call["gap_s"] for call in calls if call["gap_s"] is not None]
    seconds = [call["end"] - call["start"] for call in calls]
    pauses = [call["pause_seconds"] for call in calls]
    figures: dict[str, Any] = {
        "num": len(calls),
        "num_under_load": len(gaps),
        "gap_ms": cuts_of(gaps, 1e3),
        "pause_ms": cuts_of(pauses, 1e3),
        "served_s": cuts_of(seconds),
    }
    nbytes = calls[0]["num_bytes"]
    if nbytes:
        moved = [call.get("transfer_seconds") or call["stage_seconds"] for call in calls]
        rate = nbytes / statistics.median(moved)
        figures |= {
            "source": calls[0]["source"], "num_bytes": nbytes, "transfer_rate": rate, "copy_rate": copy_rate,
            "transfer_over_copy": rate / copy_rate,
            "stage_s": statistics.median(call["stage_seconds"] for call in calls),
            "pause_over_copy_of_all": statistics.median(pauses) / (nbytes / copy_rate),
        }  # fmt: skip
    return figures


def used_bytes(device: str) -> int:
    """Of the first GPU; what is resident of memory files and processes is not counted here on a CPU."""
    if device == "cpu":
        return 0
    from soak_clones import used_gpu_bytes

    return used_gpu_bytes(0)


def measure_sleep(server: Server, peer: Server | None, args: argparse.Namespace, before_bytes: int) -> dict[str, Any]:
    """Sleep, and wake again: with the weights of the peer, and with those that it finds by itself.

    Args:
        before_bytes: in use on the GPU before the instance was started.
    """
    question = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    held = used_bytes(args.device) - before_bytes
    sources: list[tuple[str, dict[str, Any]]] = [("peer", {"address": f"127.0.0.1:{peer.port}"})] if peer else []
    rounds = []
    for name, body in [*sources, ("its own", {})] * 3:
        start = time.perf_counter()
        server.call("/release_memory_occupation", {})
        asleep = time.perf_counter()
        left = used_bytes(args.device) - before_bytes
        wake = time.perf_counter()
        server.call("/resume_memory_occupation", body)
        awake = time.perf_counter()
        server.call("/generate", question)
        token = time.perf_counter()
        given_back = (held - left) / held if held else None
        rounds.append({"source": name, "sleep_s": asleep - start, "wake_s": awake - wake,
                       "wake_to_token_s": token - wake, "given_back": given_back})  # fmt: skip
    return {"held_bytes": held, "rounds": rounds}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    folder = choose_model(args)
    num_gpus = count_gpus(args.device)
    copy_rate = plain_copy_rate(args.device, num_gpus, args.copy_mb << 20)
    common = ["--device", args.device, "--load-format", args.load_format, OFFER]
    peer_flags = [*common, "--max-total-tokens", "4096", "--max-running-requests", "4", "--random-seed", "1"]
    if num_gpus > 1:
        peer_flags += ["--base-gpu-id", str(num_gpus - 1)]
    num_tokens = args.concurrency * (max(INPUT_LEN + args.output_len, RATE_INPUT_LEN + RATE_OUTPUT_LEN) + 64)
    flags = [*common, "--max-total-tokens", str(num_tokens), "--max-running-requests", str(args.concurrency)]
    flags += ["--enable-memory-saver"] if args.sleep else []
    values: dict[str, Any] = {"device": args.device, "concurrency": args.concurrency}
    with contextlib.ExitStack() as stack:
        peer = None
        if args.source == "instance":
            peer = stack.enter_context(running(folder, *peer_flags))
        before_bytes = used_bytes(args.device)
        server = stack.enter_context(running(folder, *flags, *args.server_flags))
        vocab_size = vocab_size_of(folder)
        values["tokens_per_s_before"] = ask_rate(server, vocab_size, args)
        changed = change_weights(server, peer, folder, args)
        values["tokens_per_s_after"] = ask_rate(server, vocab_size, args)
        values["quiet_gaps_ms"] = changed["quiet_gaps_ms"]
        for name in ("update", "rollback"):
            calls = [call for call in changed["calls"] if call["name"] == name]
            if calls:
                values[name] = describe(calls, copy_rate)
        if args.sleep:
            values["sleep"] = measure_sleep(server, peer, args, before_bytes)
    return values


def rows_of(values: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name in ("update", "rollback"):
        if (one := values.get(name)) is None:
            continue
        under_load = f"({one['num_under_load']} of {one['num']} under load)"
        rows.append((f"{name}: longest gap between tokens, p50, p99", f"{texts(one['gap_ms'], 'ms')} {under_load}"))
        rows.append((f"{name}: no pass for, p50, p99", texts(one["pause_ms"], "ms")))
        rows.append((f"{name}: request to served, p50, p99", texts(one["served_s"], "s")))
        if "num_bytes" in one:
            rows.append((f"{name}: {one['num_bytes'] / 1e9:.2f} GB from {one['source']}",
                         f"{one['transfer_rate'] / 1e9:.1f} GB/s, {one['transfer_over_copy']:.2f} x a plain copy; "
                         f"the pause is {one['pause_over_copy_of_all']:.4f} x one"))  # fmt: skip
    rows.append(("gaps without updates, p50, p99", texts(values["quiet_gaps_ms"], "ms")))
    rates = values["tokens_per_s_before"], values["tokens_per_s_after"]
    rows.append(("tokens/s before and after", f"{rates[0]:.1f}, {rates[1]:.1f}"))
    for one in (values.get("sleep") or {}).get("rounds", []):
        back = "" if one["given_back"] is None else f", {one['given_back']:.1%} given back"
        seconds = ", ".join(f"{one[name]:.3f}" for name in ("sleep_s", "wake_s", "wake_to_token_s"))
        rows.append((f"sleep, wake, wake to a token, from {one['source']}", f"{seconds} s{back}"))
    return rows


def texts(cuts: dict[str, float | None], unit: str) -> str:
    return ", ".join("-" if value is None else f"{value:.3f}" for value in cuts.values()) + f" {unit}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, help="model folder; a random one when not given")
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--source", default="instance", choices=("instance", "disk"), help="of the new weights")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=3000, help="tokens of each stream that runs beside updates")
    parser.add_argument(
        "--rate-len", type=int, default=RATE_OUTPUT_LEN, help="tokens out, for the rates before and after"
    )
    parser.add_argument("--pause", type=float, default=PAUSE_S, help="seconds between two updates")
    parser.add_argument("--warm-up", type=float, default=WARM_UP_S, help="seconds of streams before the first update")
    parser.add_argument("--copy-mb", type=int, default=4096, help="size of the plain copy")
    parser.add_argument("--sleep", action="store_true", help="measure that, too, with --enable-memory-saver")
    parser.add_argument("--work-dir", type=Path, default=RESULTS, help="where the random model is, or is made")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("server_flags", nargs="*", help="after --: more flags for the instance that is updated")
    args = parser.parse_args()
    if args.load_format == "dummy" and args.source == "disk":
        parser.error("--source disk needs files: not with --load-format dummy")
    values = measure(args)
    report("weight updates", args.output, rows_of(values), values)
    print(json.dumps(values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
