"""A server under the loads that people have: bursts, Poisson arrivals, long prompts among short ones, mixed lengths.

    python benchmark/bench_mixed.py [--url http://127.0.0.1:30000] [--only single,at-once] [--minutes 30] [--repeats 2]

It drives any server that answers POST /v1/completions with streams, prompts of token ids, ignore_eos and the usage in
the stream. Without --url it starts Ramet, on a GPU with a random model in the shape of Qwen3-8B, with the flags after
--. The groups, all greedy, each prompt new:

    single        128 in: first token, and the rate of one request
    at-once       64 and 256 requests at once, 512 in and 256 out
    poisson       16 requests a second, 512 in and 128 out, for 20 s
    poisson-long  the same, and each second one of 8192 in
    long          1 prompt of 32000, 8 of 16000, 64 of 2048, 128 out
    shared        64 requests with 2000 tokens in common and 64 of their own, 128 out
    lengths       the token time of batches of equal and of mixed lengths, once all of them decode

TTFT is the time to the first event of an output, ITL that between two events, e2e that to the end of the answer. Tokens
are counted by the server; an answer that is refused, broken off, empty or short counts as failed. --minutes runs the
load of poisson-long for so long and compares its first third with its last.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_common import MODEL_VOCAB, RESULTS, ROOT, make_parser, report, running
from bench_gpu import SERVER_FLAGS
from completion_load import Load, Outcome, Prompts, Request, cuts, done, evenly, poisson, together
from gpu_model import SHAPE, make_model

SHORT_LEN, LONG_LEN = 512, 8192
SHORT_RATE, LONG_RATE = 16.0, 1.0
OUTPUT_LEN = 128
POISSON_S = 20.0
SETTLE_S = 0.05  # after the last first token, before token times count
LENGTHS: tuple[tuple[dict[int, int], int], ...] = (  # {prompt tokens: how many}, output tokens
    ({512: 1}, 300),
    ({8192: 1}, 300),
    ({32000: 1}, 300),
    ({512: 32}, 300),
    ({512: 31, 8192: 1}, 300),
    ({512: 28, 8192: 4}, 300),
    ({512: 31, 32000: 1}, 600),
    ({8192: 32}, 400),
)
TINY_FLAGS = ["--device", "cpu", "--max-total-tokens", "16384", "--max-running-requests", "16"]


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the loads are, as factors of what they are above."""

    length: float = 1.0  # of prompts
    output: float = 1.0  # of outputs, in tokens
    count: float = 1.0
    seconds: float = 1.0

    def tokens(self, number: int) -> int:
        return max(2, round(number * self.length))

    def new_tokens(self, number: int) -> int:
        return max(2, round(number * self.output))

    def requests(self, number: int) -> int:
        return max(1, round(number * self.count))


TINY = Size(length=1 / 100, output=1 / 16, count=1 / 16, seconds=1 / 20)  # on a CPU, to see that all of it works


class Bench:
    """Runs the groups against one server and collects what they say."""

    def __init__(self, load: Load, vocab_size: int, size: Size, repeats: int, seed: int) -> None:
        self.rows: list[tuple[str, str]] = []
        self.values: dict[str, Any] = {}
        self.errors: list[str] = []
        self.num_requests = 0
        self._load = load
        self._prompts = Prompts(vocab_size, f"prompts {seed}")
        self._size = size
        self._repeats = repeats

    def run(self, group: str) -> None:
        """Measure one of GROUPS."""
        GROUPS[group](self)

    def warm_up(self) -> None:
        """What is made on first use, for prompts of both lengths and a batch."""
        size = self._size
        self._send(together(self._prompts, [size.tokens(LONG_LEN)], size.new_tokens(4)))
        lengths = [size.tokens(SHORT_LEN)] * size.requests(32)
        self._send(together(self._prompts, lengths, size.new_tokens(16)))

    def _send(self, requests: Sequence[Request], parses_at_once: bool = False) -> list[Outcome]:
        outcomes = self._load.run(requests, parses_at_once)
        self.num_requests += len(outcomes)
        failed = [one.error for one in outcomes if one.error]
        if failed:
            print(f"  {len(failed)} of {len(outcomes)} requests failed, such as: {failed[0]}", file=sys.stderr)
        self.errors += failed
        return outcomes

    def _together(self, input_lens: Sequence[int], output_len: int) -> list[Outcome]:
        return self._send(together(self._prompts, input_lens, output_len))

    def _say(self, label: str, text: str, values: dict[str, Any]) -> None:
        print(f"{label}: {text}", file=sys.stderr)
        self.rows.append((label, text))
        self.values[label] = values

    # ---- the groups ----

    def single(self) -> None:
        """One request at a time."""
        input_len, output_len = self._size.tokens(128), self._size.new_tokens(257)
        self._together([input_len], self._size.new_tokens(8))
        firsts = [one for _ in range(9) for one in done(self._together([input_len], 1))]
        wholes = [one for _ in range(3) for one in done(self._together([input_len], output_len))]
        ttfts = [one.ttft_s * 1e3 for one in firsts]
        if ttfts:
            answers = [one.e2e_s * 1e3 for one in firsts]
            values = {"ttft_ms": ttfts, "e2e_ms": answers}
            text = f"{median(ttfts):.2f} ms, whole answer of one token {median(answers):.2f} ms; {input_len} in"
            self._say("first token", text, values)
        if wholes and ttfts:
            rates = [(output_len - 1) / (one.e2e_s - median(ttfts) / 1e3) for one in wholes]
            self._say("decode, one request", f"{median(rates):.1f} tokens/s", {"tokens_per_s": rates})

    def at_once(self) -> None:
        """Many requests that come together."""
        input_len, output_len = self._size.tokens(SHORT_LEN), self._size.new_tokens(256)
        for number in (64, 256):
            count = self._size.requests(number)
            self._together([input_len] * count, self._size.new_tokens(4))
            self._burst(f"{count} at once", [input_len] * count, output_len)

    def poisson(self) -> None:
        """Short prompts that arrive by themselves."""
        self._mixed("poisson", POISSON_S * self._size.seconds, 0.0)

    def poisson_long(self) -> None:
        """Short prompts that arrive by themselves, and long ones among them."""
        self._mixed("poisson-long", POISSON_S * self._size.seconds, LONG_RATE)

    def long(self) -> None:
        """Long prompts by themselves."""
        for length, number in ((32000, 1), (16000, 8), (2048, 64)):
            lengths = [self._size.tokens(length)] * self._size.requests(number)
            self._burst(f"{len(lengths)} x {lengths[0]} in", lengths, self._size.new_tokens(OUTPUT_LEN))

    def shared(self) -> None:
        """Prompts with a long prefix in common, which one has left in the cache."""
        size, count = self._size, self._size.requests(64)
        runs = []
        for _ in range(self._repeats):
            prefix = self._prompts.make(size.tokens(2000))
            self._send([Request(prefix, 2)])
            own = [self._prompts.make(size.tokens(64)) for _ in range(count)]
            runs.append(self._send([Request(f"{prefix},{one}", size.new_tokens(OUTPUT_LEN)) for one in own]))
        self._say_burst(f"{count} x ({size.tokens(2000)} shared + {size.tokens(64)}) in", runs)

    def lengths(self, batches: Sequence[tuple[dict[int, int], int]] = LENGTHS) -> None:
        """The token time while a batch decodes."""
        for counts, output_len in batches:
            parts = {self._size.tokens(length): self._size.requests(number) for length, number in counts.items()}
            lens = [length for length, number in parts.items() for _ in range(number)]
            gaps: list[float] = []
            for _ in range(self._repeats):
                outcomes = done(self._together(lens, self._size.new_tokens(output_len)))
                gaps += token_times(outcomes, SETTLE_S * self._size.seconds) if len(outcomes) == len(lens) else []
            label = "token time " + " + ".join(f"{number} x {length}" for length, number in parts.items())
            values = cuts(gaps) | {"num": len(gaps)}
            self._say(label, f"p50 {values['p50']:.2f} p99 {values['p99']:.2f} ms of {len(gaps)}", values)

    def steady(self, minutes: float) -> None:
        """The mixed load for long: its first third beside its last."""
        seconds = 60 * minutes
        outcomes = self._send(self._mixed_requests(seconds, LONG_RATE), parses_at_once=True)
        thirds = {"first": (0.0, seconds / 3), "last": (seconds * 2 / 3, seconds)}
        values = {name: third(outcomes, start, end) for name, (start, end) in thirds.items()}
        for name, one in values.items():
            label = f"{minutes:g} minutes, {name} third"
            text = f"{one['tokens_per_s']:.0f} tokens/s; {latencies(one)}; {one['failed']} of {one['requests']} failed"
            self._say(label, text, one)

    # ---- inside ----

    def _burst(self, label: str, input_lens: Sequence[int], output_len: int) -> None:
        runs = [self._together(input_lens, output_len) for _ in range(self._repeats)]
        self._say_burst(label, runs, sum(input_lens))

    def _say_burst(self, label: str, runs: Sequence[list[Outcome]], num_input: int = 0) -> None:
        values: dict[str, Any] = {
            "seconds": [max(one.end_s for one in run) for run in runs],
            "failed": sum(1 for run in runs for one in run if one.error),
            "ttft_p50_ms": [cuts([one.ttft_s for one in done(run)])["p50"] for run in runs],
            "ttft_max_ms": [max((one.ttft_s * 1e3 for one in done(run)), default=float("nan")) for run in runs],
        }
        values["tokens_per_s"] = [
            sum(one.num_tokens for one in done(run)) / seconds
            for run, seconds in zip(runs, values["seconds"], strict=True)
        ]
        middle = {name: median(each) for name, each in values.items() if name != "failed"}
        prompt_rate = f", {num_input / middle['seconds']:.0f} prompt tokens/s" if num_input else ""
        text = (
            f"{middle['tokens_per_s']:.0f} tokens/s{prompt_rate} in {middle['seconds']:.2f} s; TTFT p50 "
            f"{middle['ttft_p50_ms']:.1f} max {middle['ttft_max_ms']:.1f} ms; {values['failed']} failed"
        )
        self._say(label, text, values)

    def _mixed_requests(self, seconds: float, long_rate: float) -> list[Request]:
        size, output_len = self._size, self._size.new_tokens(OUTPUT_LEN)
        short_len, long_len = size.tokens(SHORT_LEN), size.tokens(LONG_LEN)
        requests = poisson(self._prompts, SHORT_RATE, seconds, short_len, output_len, "short")
        if long_rate:
            requests += evenly(self._prompts, long_rate, seconds, long_len, output_len, "long")
        return requests

    def _mixed(self, label: str, seconds: float, long_rate: float) -> None:
        outcomes = self._send(self._mixed_requests(seconds, long_rate))
        values = summary(outcomes)
        self._say(label, f"{latencies(values)}; {values['failed']} of {values['requests']} failed", values)


GROUPS: dict[str, Callable[[Bench], None]] = {
    "single": Bench.single,
    "at-once": Bench.at_once,
    "poisson": Bench.poisson,
    "poisson-long": Bench.poisson_long,
    "long": Bench.long,
    "shared": Bench.shared,
    "lengths": Bench.lengths,
}


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def token_times(outcomes: Sequence[Outcome], settle_s: float) -> list[float]:
    """Seconds between the events of requests that came together, from when all decode until the first one ends."""
    start_s = max(one.times[0] for one in outcomes) + settle_s
    end_s = min(one.times[-1] for one in outcomes)
    return [gap for one in outcomes for gap in one.gaps(start_s, end_s)]


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Percentiles of the short requests, and of the long ones' first tokens, in milliseconds."""
    short, long = done(outcomes, "short"), done(outcomes, "long")
    return {
        "requests": len(outcomes),
        "failed": sum(1 for one in outcomes if one.error),
        "ttft": cuts([one.ttft_s for one in short]),
        "itl": cuts([gap for one in short for gap in one.gaps()]),
        "e2e": cuts([one.e2e_s for one in short]),
        "long_ttft": cuts([one.ttft_s for one in long]) if long else None,
    }


def third(outcomes: Sequence[Outcome], start_s: float, end_s: float) -> dict[str, Any]:
    """The summary of the requests sent between two times, and the tokens that came meanwhile, in each second."""
    tokens = 0.0
    for one in done(outcomes):
        tokens += one.num_tokens * sum(start_s <= when < end_s for when in one.times) / len(one.times)
    sent = summary([one for one in outcomes if start_s <= one.sent_s < end_s])
    return sent | {"tokens_per_s": tokens / (end_s - start_s)}


def latencies(values: dict[str, Any]) -> str:
    """A summary for people."""
    parts = [
        f"{name.upper() if name != 'e2e' else name} p50 {values[name]['p50']:.1f} p99 {values[name]['p99']:.1f} ms"
        for name in ("ttft", "itl", "e2e")
    ]
    if values["long_ttft"]:
        parts.append(f"long TTFT p50 {values['long_ttft']['p50']:.1f} p99 {values['long_ttft']['p99']:.1f} ms")
    return ", ".join(parts)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--url", help="a running server; one is started when not given")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups to measure")
    parser.add_argument("--minutes", type=float, default=0.0, help="also run the mixed load for so long")
    parser.add_argument("--repeats", type=int, default=2, help="of each burst, with other prompts; medians are shown")
    parser.add_argument("--vocab-size", type=int, help="prompts are random ids below it; the model's when not given")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all lengths, of prompts and outputs")
    parser.add_argument(
        "--tiny", action="store_true", help="the demo model on a CPU and small loads: not a measurement"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")
    args = parser.parse_args()
    args.only = [name for name in args.only.split(",") if name]
    if unknown := sorted(set(args.only) - set(GROUPS)):
        parser.error(f"--only: unknown groups {', '.join(unknown)}; known are {', '.join(GROUPS)}")
    if args.repeats < 1 or args.scale <= 0 or args.minutes < 0:
        parser.error("--repeats must be 1 or more, --scale above 0, --minutes not below 0")
    return args


def find_model(args: argparse.Namespace) -> tuple[Path, list[str]]:
    """The folder and the flags of the server to be started."""
    if args.tiny:
        return args.model_path or ROOT / "examples" / "demo_model", TINY_FLAGS
    return args.model_path or make_model(RESULTS / "model-8b", SHAPE), SERVER_FLAGS


def main() -> int:
    args = parse_args()
    size = TINY if args.tiny else Size(length=args.scale, output=args.scale)
    with contextlib.ExitStack() as stack:
        url, vocab_size = args.url, args.vocab_size or MODEL_VOCAB
        if url is None:
            folder, flags = find_model(args)
            vocab_size = args.vocab_size or json.loads((folder / "config.json").read_text())["vocab_size"]
            url = stack.enter_context(running(folder, *flags, *args.server_flags)).url
        bench = Bench(stack.enter_context(Load(url)), vocab_size, size, args.repeats, args.seed)
        try:
            bench.warm_up()
            for group in args.only:
                bench.run(group)
            if args.minutes:
                bench.steady(args.minutes)
        finally:  # also what was measured before an error
            failed = f"{len(bench.errors)} of {bench.num_requests} failed"
            values = {"failed": len(bench.errors), "requests": bench.num_requests, "errors": sorted(set(bench.errors))}
            report("mixed", args.output, [*bench.rows, ("requests", failed)], values | bench.values)
    return 1 if bench.errors else 0


if __name__ == "__main__":
    sys.exit(main())
