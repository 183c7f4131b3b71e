"""What a model with linear layers reaches on a GPU: Qwen3.5's dense shape, each figure beside its floor.

    python benchmark/bench_hybrid.py [--only kernels,one,many,long] [--device cuda] [--output FILE] [--work-dir FOLDER]

Weights are made up by the server, in bfloat16. Kernels: one layer's convolution and delta rule, decoding 1 and 64
requests against the rate at which a plain copy moves their states, and for 2048 and 32,000 tokens of one prompt. One:
a request's token rate over HTTP, against the copy's rate over the bytes of weights and its states. Many: 64 requests at
once, 512 tokens in and 256 out, against the prompts' operations at the rate of a product of matrices and the bytes of
weights, states and keys that decoding moves. Long: the first token of 32,000 tokens in, beside that of Qwen3-8B's
shape, whose layers all have full attention. On a CPU a tiny model shows only that all of it works.

Prints a table.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_common import RESULTS, ROOT, Server, random_prompt, report, running
from bench_serving import run_load
from gpu_model import HYBRID_SHAPE, SHAPE, TINY, TINY_HYBRID, write_config, write_large_tokenizer

PARTS = ("kernels", "one", "many", "long")
MANY, INPUT_LEN, OUTPUT_LEN = 64, 512, 256
LONG = 32_000
KERNEL_CHUNKS = (2048, LONG)
Rows = list[tuple[str, str]]


@dataclass
class Scale:
    """How much of everything is measured."""

    hybrid: dict[str, Any]
    dense: dict[str, Any]
    num_requests: int
    input_len: int
    output_len: int
    long_len: int
    chunks: tuple[int, ...]
    flags: tuple[str, ...]


def scale_of(device: str) -> Scale:
    if device == "cpu":
        return Scale(TINY_HYBRID, TINY, 4, 32, 16, 200, (70,), ("--max-total-tokens", "4096", "--device", "cpu"))
    flags = ("--max-total-tokens", "131072", "--max-running-requests", str(MANY))
    return Scale(HYBRID_SHAPE, SHAPE, MANY, INPUT_LEN, OUTPUT_LEN, LONG, KERNEL_CHUNKS, flags)


@dataclass
class Limits:
    """Bytes (read plus written) and operations per second of this device."""

    copy: float
    product: float

    @classmethod
    def measure(cls, device: Any) -> "Limits":
        import torch
        from gpu_timing import time_on

        num_bytes, size = (4 << 30, 8192) if device.type == "cuda" else (1 << 24, 256)
        source, target = (torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
        copy_s = statistics.median(time_on(device, lambda: target.copy_(source), 10))
        a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
        product_s = statistics.median(time_on(device, lambda: a @ b, 10))
        return cls(2 * num_bytes / copy_s, 2 * size**3 / product_s)


@dataclass
class Sizes:
    """What a shape's passes read and write, in bytes, and its matrices' elements."""

    num_active: int  # elements of the matrices that each token is multiplied with
    head: int  # of the output head's
    state: int  # of one sequence
    token: int  # keys and values

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Sizes":
        hidden, dim, interval = config["hidden_size"], config["head_dim"], config["full_attention_interval"]
        q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
        num_full = config["num_hidden_layers"] // interval
        num_linear = config["num_hidden_layers"] - num_full
        keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        heads = config["linear_num_value_heads"]
        values = heads * config["linear_value_head_dim"]
        full = hidden * (2 * q + 2 * kv + q)
        linear = hidden * (2 * keys + 2 * values + 2 * heads + values)
        mlp = 3 * hidden * config["intermediate_size"]
        conv = (config["linear_conv_kernel_dim"] - 1) * (2 * keys + values) * 2
        state = conv + values * config["linear_key_head_dim"] * 4
        head = hidden * config["vocab_size"]
        active = num_full * full + num_linear * linear + config["num_hidden_layers"] * mlp
        return cls(active, head, num_linear * state, num_full * 2 * kv * 2)

    def decode_bytes(self, num_requests: int, num_tokens: float) -> float:
        """Of one pass, each request behind so many tokens; states are read and written."""
        each = 2 * self.state + num_tokens * self.token
        return 2 * (self.num_active + self.head) + num_requests * each

    def many_s(self, limits: Limits, scale: Scale) -> float:
        """Seconds that all requests take at least."""
        prompts = 2 * self.num_active * scale.num_requests * scale.input_len / limits.product
        middle = scale.input_len + scale.output_len / 2
        return prompts + scale.output_len * self.decode_bytes(scale.num_requests, middle) / limits.copy


def measure_kernels(device: Any, limits: Limits, scale: Scale, rows: Rows, values: dict[str, Any]) -> None:
    """One layer behind its projections."""
    import torch
    from delta_case import DeltaCase, Part
    from gpu_timing import time_on
    from ramet.srt.configs.delta_config import DeltaTraits

    config = scale.hybrid
    traits = DeltaTraits(
        num_key_heads=config["linear_num_key_heads"],
        num_value_heads=config["linear_num_value_heads"],
        key_dim=config["linear_key_head_dim"],
        value_dim=config["linear_value_head_dim"],
        kernel_size=config["linear_conv_kernel_dim"],
        is_by_key_head=False,
    )
    case = DeltaCase(device, traits, torch.bfloat16, num_rows=scale.num_requests, num_slots=scale.num_requests)
    case.fill_states()
    has_kernels = device.type == "cuda"

    def seconds(parts: list[Part]) -> float:
        batch, inputs = case.batch(parts), case.inputs(sum(part.length for part in parts))
        case.passes.begin(batch)
        return statistics.median(time_on(device, lambda: case.run(batch, inputs, kernels=has_kernels), 20))

    for count in (1, scale.num_requests):
        taken = seconds([Part(row, 100, 1) for row in range(count)])
        floor = 2 * count * case.layer.spec.num_bytes(torch.bfloat16) / limits.copy
        rows.append((f"a layer, {count} decoding", f"{taken * 1e6:.0f} µs; {floor / taken:.0%} of the copy's rate"))
        values[f"step_{count}"] = {"seconds": taken, "floor": floor}
    for length in scale.chunks:
        taken = seconds([Part(0, 0, length)])
        rows.append((f"a layer, {length} tokens of a prompt", f"{taken * 1e3:.2f} ms"))
        values[f"chunk_{length}"] = taken


def ask_s(server: Server, vocab_size: int, input_len: int, output_len: int, seed: int) -> float:
    prompt = random_prompt(input_len, vocab_size, random.Random(seed))
    sampling = {"temperature": 0, "max_new_tokens": output_len, "ignore_eos": True}
    start = time.perf_counter()
    server.call("/generate", {"input_ids": prompt, "sampling_params": sampling})
    return time.perf_counter() - start


def measure_one(server: Server, limits: Limits, scale: Scale, rows: Rows, values: dict[str, Any]) -> None:
    vocab_size, length = scale.hybrid["vocab_size"], scale.input_len // 4
    ask_s(server, vocab_size, length, 8, 0)
    first = statistics.median(ask_s(server, vocab_size, length, 1, seed) for seed in range(1, 6))
    whole = statistics.median(ask_s(server, vocab_size, length, scale.output_len + 1, seed) for seed in range(6, 9))
    rate = scale.output_len / (whole - first)
    limit = limits.copy / Sizes.of(scale.hybrid).decode_bytes(1, length + scale.output_len / 2)
    rows.append(("first token", f"{first * 1e3:.1f} ms, {length} tokens in"))
    rows.append(("one request", f"{rate:.1f} tokens/s; {rate / limit:.0%} of {limit:.1f}"))
    values |= {"one": rate, "one_limit": limit, "first_token_s": first}


def measure_many(server: Server, limits: Limits, scale: Scale, rows: Rows, values: dict[str, Any]) -> None:
    load = argparse.Namespace(
        seed=100, num_requests=scale.num_requests, concurrency=scale.num_requests, input_len=scale.input_len,
        output_len=scale.output_len, shared_prefix_len=0, vocab_size=scale.hybrid["vocab_size"], abort_share=0.0,
        request_rate=float("inf"),
    )  # fmt: skip
    asyncio.run(run_load(server.url, argparse.Namespace(**(vars(load) | {"seed": 101, "output_len": 4}))))
    outcomes, seconds = asyncio.run(run_load(server.url, load))
    done = sum(outcome.num_output_tokens for outcome in outcomes if outcome.status == "done")
    floor = scale.num_requests * scale.output_len / Sizes.of(scale.hybrid).many_s(limits, scale)
    text = f"{done / seconds:.0f} tokens/s; {done / seconds / floor:.0%} of {floor:.0f}"
    rows.append((f"{scale.num_requests} at once", text))
    values["many"] = {"tokens_per_s": done / seconds, "floor": floor}


def measure_long(server: Server, config: dict[str, Any], name: str, scale: Scale, rows: Rows, values: dict) -> None:
    ask_s(server, config["vocab_size"], scale.long_len, 1, 0)
    seconds = statistics.median(ask_s(server, config["vocab_size"], scale.long_len, 1, seed) for seed in (1, 2, 3))
    rows.append((f"{name}: {scale.long_len} tokens in", f"first token after {seconds * 1e3:.0f} ms"))
    values[f"long_{name}"] = seconds


def model_folder(work_dir: Path, name: str, config: dict[str, Any]) -> Path:
    folder = work_dir / name
    if not (folder / "tokenizer.json").is_file():
        write_large_tokenizer(write_config(folder, config), config["vocab_size"])
    return write_config(folder, config)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("--work-dir", type=Path, default=RESULTS / "hybrid", help="where model folders are written")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only knows {', '.join(PARTS)}; got {', '.join(unknown)}")
    sys.path.insert(0, str(ROOT / "test"))
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_hybrid.py measures on a GPU, and there is none; --device cpu shows that it works")
    device, scale = torch.device(args.device), scale_of(args.device)
    rows: Rows = []
    values: dict[str, Any] = {}
    limits = Limits.measure(device)
    rows.append(("limits", f"copy {limits.copy / 1e9:.0f} GB/s, product {limits.product / 1e12:.1f} TFLOP/s"))
    if "kernels" in parts:
        measure_kernels(device, limits, scale, rows, values)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    flags = ("--load-format", "dummy", *scale.flags)
    if set(parts) - {"kernels"}:
        with running(model_folder(args.work_dir, "qwen3.5", scale.hybrid), *flags) as server:
            if "one" in parts:
                measure_one(server, limits, scale, rows, values)
            if "many" in parts:
                measure_many(server, limits, scale, rows, values)
            if "long" in parts:
                measure_long(server, scale.hybrid, "Qwen3.5 9B", scale, rows, values)
    if "long" in parts:
        with running(model_folder(args.work_dir, "qwen3", scale.dense), *flags) as server:
            measure_long(server, scale.dense, "Qwen3 8B", scale, rows, values)
    report("hybrid", args.output, rows, values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
