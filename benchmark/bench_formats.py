"""One request to the same shape in several formats of its weights, by turns: the rate of decoding, and first tokens.

    python benchmark/bench_formats.py [--formats bfloat16,fp8,awq,gptq] [--repeats 5] [--cpu | --tiny] [-- server flags]

A server for each format, all at once on one GPU, in the shape of Qwen3-8B and with made-up weights: outputs mean
nothing. Each round asks each server for the same number of tokens; rates are medians of the rounds, of the tokens after
the first one, and set against those of the first format. `--cpu` measures on a CPU, in the shape of Qwen3-0.6B;
`--tiny` takes a small shape there, to see that it works.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_common import report, running
from completion_load import Load, Outcome, Prompts, together
from gpu_model import SHAPE, SMALL, TINY, write_config, write_large_tokenizer

INTEGERS = {"bits": 4, "group_size": 128}


def _compressed(spelling: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": spelling,
        "ignore": ["lm_head"],
        "config_groups": {"a": group},
    }


FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "awq": INTEGERS | {"quant_method": "awq", "version": "gemm", "zero_point": True},
    "gptq": INTEGERS | {"quant_method": "gptq", "desc_act": False, "sym": False},
    "int8": _compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    "int4": _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=128),
    "mxfp4": _compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    "nvfp4": _compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
}
FLAGS = ["--load-format", "dummy", "--max-total-tokens", "16384", "--max-running-requests", "16"]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16}  # whole groups and blocks of 128


def main() -> int:
    args = parse_args()
    shape, flags = SHAPE, [*FLAGS, *args.server_flags]
    if args.cpu:
        shape, flags = SMALL, [*flags, "--device", "cpu"]
    elif args.tiny:
        shape, flags = TINY | WIDE | {"eos_token_id": None}, [*flags, "--device", "cpu"]
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loads = {}
        for name in args.formats:
            section = {"quantization_config": FORMATS[name]} if FORMATS[name] else {}
            folder = write_config(place / name, shape | section)
            write_large_tokenizer(folder, shape["vocab_size"])
            server = stack.enter_context(running(folder, *flags))
            loads[name] = stack.enter_context(Load(server.url))
        prompts = Prompts(shape["vocab_size"], "formats")

        def ask(name: str) -> Outcome:
            (outcome,) = loads[name].run(together(prompts, [args.input_len], args.output_len))
            if outcome.error:
                raise RuntimeError(f"a request of {name} failed: {outcome.error}")
            return outcome

        for name in loads:
            ask(name)  # what is made on first use
        rounds = [{name: ask(name) for name in loads} for _ in range(args.repeats)]
    values = {name: summarise([one[name] for one in rounds]) for name in args.formats}
    base, *_ = (one["rate"] for one in values.values())
    rows = [
        (name, f"{one['rate']:.1f} tokens/s, {one['rate'] / base:.2f}; first token {one['ttft_ms']:.1f} ms")
        for name, one in values.items()
    ]
    report(f"formats, {args.input_len} in and {args.output_len} out", args.output, rows, values)
    return 0


def summarise(outcomes: list[Outcome]) -> dict[str, Any]:
    """Medians of one format's requests."""
    rates = [(one.num_tokens - 1) / (one.end_s - one.times[0]) for one in outcomes]
    ttft_ms = statistics.median(one.ttft_s for one in outcomes) * 1e3
    return {"rate": statistics.median(rates), "ttft_ms": ttft_ms, "rates": rates}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="bfloat16,fp8,awq", help="of " + ", ".join(FORMATS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--input-len", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--output-len", type=int, default=256, help="tokens of an output")
    parser.add_argument("--cpu", action="store_true", help="measure on a CPU")
    parser.add_argument("--tiny", action="store_true", help="a small shape on a CPU: not a measurement")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("server_flags", nargs="*", help="after --: more flags for every server")
    args = parser.parse_args()
    args.formats = args.formats.split(",")
    if unknown := set(args.formats) - FORMATS.keys():
        parser.error(f"unknown formats: {', '.join(sorted(unknown))}; there are {', '.join(FORMATS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
