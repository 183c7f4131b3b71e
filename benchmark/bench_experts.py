"""Experts, fp8 weights, an fp8 KV cache and two GPUs' experts: what a server reaches, each row beside its floor.

    python benchmark/bench_experts.py [--only fp8,experts,experts-fp8,cache,ep,exchange] [--work-dir FOLDER]

    fp8          Qwen3-8B's shape with --quantization fp8: one request, 64 and 256 at once
    experts      Qwen3-30B-A3B's shape in bfloat16: the same
    experts-fp8  the same with --quantization fp8
    cache        Qwen3-8B's shape, 32 requests of 8192 tokens: a token's time with the KV cache in bfloat16 and in fp8
    ep           Qwen3-30B-A3B's shape over two GPUs, --tp-size 2 --ep-size 2, with and without data-parallel attention,
                 and on one GPU: 64 and 256 at once
    exchange     one layer of these experts on two GPUs, in a CUDA graph: the sum of all tokens, and the exchange of
                 data-parallel attention, with balanced routing and with half of the tokens for one expert

Weights are made up (--load-format dummy). The floor of one request is the bytes of the weights that a token needs, at
the rate of a plain copy that the same run measures; that of many adds the KV cache, the experts that so many tokens are
expected to hit, and the prompts' operations at the rate of a bfloat16 product. --tiny runs the parts that a CPU can run
with small models: it shows that all of it works, and measures nothing. Flags after -- go to every server.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_common import RESULTS, ROOT, report, running
from bench_gpu import SERVER_FLAGS, Limits, empty_gpu
from bench_mixed import TINY as TINY_SIZE
from bench_mixed import TINY_FLAGS, Bench, Size
from completion_load import Load
from gpu_model import EXPERTS_SHAPE, SHAPE, TINY, TINY_EXPERTS, write_config, write_large_tokenizer

INPUT_LEN, OUTPUT_LEN = 512, 256
CACHE_BATCH: tuple[dict[int, int], int] = ({8192: 32}, 400)
EXCHANGED = (64, 256, 2048)  # tokens
NUM_TIMED = 20
FP8 = ["--quantization", "fp8"]
EP = ["--tp-size", "2", "--ep-size", "2"]
PARTS = ("fp8", "experts", "experts-fp8", "cache", "ep", "exchange")
ON_CPU = ("fp8", "experts", "experts-fp8")
Rows = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Floors:
    """What a model's bytes and operations allow, on one GPU."""

    config: dict[str, Any]
    weight_bytes: int  # of a number of a linear layer
    limits: Limits

    def decode_s(self, num_requests: int, length: float, kv_bytes: int = 2) -> float:
        """Seconds of a pass that gives each request a token, behind `length` others."""
        config = self.config
        weights = config["num_hidden_layers"] * (self._attention + self._mlp(num_requests)) * self.weight_bytes
        head = 2 * config["vocab_size"] * config["hidden_size"]
        row = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * kv_bytes
        return (weights + head + num_requests * length * row) / self.limits.copy

    def rate(self, num_requests: int) -> float:
        """Tokens in a second of requests that come together, their prompts included."""
        active = self.config["num_hidden_layers"] * (self._attention + self._mlp(1))
        prompts = num_requests * INPUT_LEN * 2 * active / self.limits.product
        seconds = prompts + OUTPUT_LEN * self.decode_s(num_requests, INPUT_LEN + OUTPUT_LEN / 2)
        return num_requests * OUTPUT_LEN / seconds

    @property
    def _attention(self) -> int:
        config = self.config
        heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
        return config["hidden_size"] * config["head_dim"] * heads

    def _mlp(self, num_tokens: int) -> float:
        """Numbers of a layer's MLP that so many tokens need, each with experts of its own chance."""
        config = self.config
        if "num_experts" not in config:
            return 3 * config["hidden_size"] * config["intermediate_size"]
        total, chosen = config["num_experts"], config["num_experts_per_tok"]
        hit = total * (1 - (1 - chosen / total) ** num_tokens)
        return hit * 3 * config["hidden_size"] * config["moe_intermediate_size"] + total * config["hidden_size"]


class Table:
    """Runs the parts, and has what they say."""

    def __init__(self, args: argparse.Namespace, limits: Limits) -> None:
        self.rows: Rows = []
        self.values: dict[str, Any] = {}
        self._args = args
        self._limits = limits
        self._size = TINY_SIZE if args.tiny else Size()

    def run(self, part: str) -> None:
        if part == "cache":
            self._cache()
        elif part == "ep":
            self._ep()
        elif part == "exchange":
            self._exchange()
        else:
            flags = [] if part == "experts" else FP8
            self._serve(part, part != "fp8", flags, ("single", "at-once"))

    def _say(self, label: str, text: str, value: Any) -> None:
        print(f"{label}: {text}", file=sys.stderr)
        self.rows.append((label, text))
        self.values[label] = value

    def _measure(self, has_experts: bool, flags: list[str], run: Callable[[Bench], None]) -> Bench:
        """One server's life."""
        tiny = self._args.tiny
        shape = (TINY_EXPERTS if tiny else EXPERTS_SHAPE) if has_experts else (TINY if tiny else SHAPE)
        folder = write_config(self._args.work_dir / f"{'experts' if has_experts else 'dense'}{'-tiny' * tiny}", shape)
        if not (folder / "tokenizer.json").is_file():
            write_large_tokenizer(folder, shape["vocab_size"])
        common = [*(TINY_FLAGS if tiny else SERVER_FLAGS), "--load-format", "dummy", *self._args.server_flags]
        with running(folder, *common, *flags) as server, Load(server.url) as load:
            bench = Bench(load, shape["vocab_size"], self._size, self._args.repeats, 0)
            bench.warm_up()
            run(bench)
        if bench.errors:
            raise RuntimeError(f"{len(bench.errors)} requests failed, such as: {bench.errors[0]}")
        return bench

    def _serve(self, name: str, has_experts: bool, flags: list[str], groups: tuple[str, ...]) -> dict[str, float]:
        """Token rates by number of requests."""

        def run(bench: Bench) -> None:
            for group in groups:
                bench.run(group)

        values = self._measure(has_experts, flags, run).values
        floors = Floors(EXPERTS_SHAPE if has_experts else SHAPE, 1 if FP8[1] in flags else 2, self._limits)
        rates: dict[str, float] = {}
        if "single" in groups:
            first = statistics.median(values["first token"]["ttft_ms"])
            rate = statistics.median(values["decode, one request"]["tokens_per_s"])
            floor = 1 / floors.decode_s(1, 0)
            self._say(f"{name}, first token", f"{first:.1f} ms, 128 in", first)
            self._say(f"{name}, one request", f"{rate:.0f} tokens/s; {rate / floor:.0%} of {floor:.0f}", rate)
            rates["1"] = rate
        for count in (64, 256):
            label = f"{self._size.requests(count)} at once"
            rate = statistics.median(values[label]["tokens_per_s"])
            floor = floors.rate(count)
            self._say(f"{name}, {label}", f"{rate:.0f} tokens/s; {rate / floor:.0%} of one GPU's {floor:.0f}", rate)
            rates[str(count)] = rate
        return rates

    def _cache(self) -> None:
        times = {}
        floors = Floors(SHAPE, 2, self._limits)
        ((length, number),) = CACHE_BATCH[0].items()
        for name, flags, kv_bytes in (("bfloat16", [], 2), ("fp8", ["--kv-cache-dtype", "fp8_e4m3"], 1)):
            values = self._measure(False, flags, lambda bench: bench.lengths([CACHE_BATCH])).values
            (found,) = (one for label, one in values.items() if label.startswith("token time"))
            times[name] = found["p50"]
            floor = floors.decode_s(number, length + CACHE_BATCH[1] / 2, kv_bytes) * 1e3
            text = f"{times[name]:.2f} ms a token; at least {floor:.2f}"
            self._say(f"cache in {name}, {number} x {length}", text, times[name])
        ratio = times["fp8"] / times["bfloat16"]
        self._say("cache in fp8 against bfloat16", f"{ratio:.2f} of its time", ratio)

    def _ep(self) -> None:
        attention = ["--dp-size", "2", "--enable-dp-attention"]
        ways = {"one GPU": [], "two GPUs, ep 2": EP, "two GPUs, ep 2, data-parallel attention": [*EP, *attention]}
        rates = {name: self._serve(name, True, flags, ("at-once",)) for name, flags in ways.items()}
        for name in list(ways)[1:]:
            for count, alone in rates["one GPU"].items():
                ratio = rates[name][count] / alone
                self._say(f"{name}, {count} at once, against one GPU", f"{ratio:.2f} times", ratio)

    def _exchange(self) -> None:
        import torch.multiprocessing as mp
        from expert_layer_times import time_layers

        output = self._args.work_dir / "exchange.json"
        self._args.work_dir.mkdir(parents=True, exist_ok=True)
        (store := self._args.work_dir / "exchange.store").unlink(missing_ok=True)
        mp.spawn(time_layers, (str(store), str(output), EXPERTS_SHAPE, EXCHANGED, NUM_TIMED), 2)
        for label, one in json.loads(output.read_text()).items():
            read = one["read_bytes"] / self._limits.copy
            sent = one["sent_bytes"] / self._limits.peer_copy
            floor = (read + sent) * 1e6
            self._say(label, f"{one['us']:.1f} µs; at least {floor:.1f}, {sent * 1e6:.1f} of it on the way", one)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("server_flags", nargs="*", help="after --: more flags for every server")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure")
    parser.add_argument("--work-dir", type=Path, default=RESULTS, help="for configs and tokenizers")
    parser.add_argument("--repeats", type=int, default=2, help="of each burst; medians are shown")
    parser.add_argument("--tiny", action="store_true", help="small models on a CPU: not a measurement")
    args = parser.parse_args()
    parts = [part for part in args.only.split(",") if part]
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--only: unknown parts {', '.join(unknown)}; known are {', '.join(PARTS)}")
    if args.tiny and (wrong := sorted(set(parts) - set(ON_CPU))):
        parser.error(f"--tiny: {', '.join(wrong)} need GPUs")
    sys.path.insert(0, str(ROOT / "test"))
    import torch

    if not args.tiny and {"ep", "exchange"} & set(parts) and torch.cuda.device_count() < 2:
        parser.error("ep and exchange need two GPUs")
    limits = Limits(1.0, 1.0, 1.0) if args.tiny else Limits.measure()
    empty_gpu()
    table = Table(args, limits)
    table.rows.append(("limits", f"copy {limits.copy / 1e9:.0f} GB/s, product {limits.product / 1e12:.0f} TFLOP/s, "
                                 f"peer copy {limits.peer_copy / 1e9:.0f} GB/s"))  # fmt: skip
    try:
        for part in parts:
            table.run(part)
    finally:  # also what was measured before an error
        report("experts", args.output, table.rows, {"limits": dataclasses.asdict(limits)} | table.values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
