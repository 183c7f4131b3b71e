"""A batch whose requests have different LoRA adapters, beside the same batch of the model's own requests.

    python benchmark/bench_adapters.py [--model-path MODEL] [--adapters 16] [--batch 64] [-- server flags]

One server with all adapters loaded, of one rank and for every matrix of attention and MLP. A burst of `--batch`
requests goes to the model, and one goes to the adapters in turn; the tokens a second of both, and their ratio, are
medians of `--repeats` rounds that take turns. The adapters hold the same random numbers, which no server can know.
Without --model-path it serves a random model in the shape of Qwen3-8B, which a GPU is needed for; `--tiny` takes the
demo model on a CPU, to see that all of it works.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

from bench_common import RESULTS, ROOT, make_parser, report, running
from bench_gpu import SERVER_FLAGS
from completion_load import Load, Prompts, together
from gpu_model import SHAPE, make_model

TINY_FLAGS = ["--device", "cpu", "--max-total-tokens", "16384", "--max-running-requests", "64"]


def main() -> int:
    args = parse_args()
    if args.tiny:
        folder, flags = args.model_path or ROOT / "examples" / "demo_model", TINY_FLAGS
    else:
        folder, flags = args.model_path or make_model(RESULTS / "model-8b", SHAPE), SERVER_FLAGS
    config = json.loads((folder / "config.json").read_text())
    prompts = Prompts(config["vocab_size"], "adapters")
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = [f"adapter-{number}" for number in range(args.adapters)]
        write_random_adapters([place / name for name in names], config, args.rank)
        paths = [f"{name}={place / name}" for name in names]
        lora = ["--max-loras-per-batch", str(args.adapters), "--max-lora-rank", str(args.rank), "--lora-paths", *paths]
        server = stack.enter_context(running(folder, *flags, *args.server_flags, *lora))
        load = stack.enter_context(Load(server.url))

        def rate(models: list[str]) -> float:
            requests = together(prompts, [args.input_len] * args.batch, args.output_len)
            for number, request in enumerate(requests):
                request.model = models[number % len(models)] if models else ""
            outcomes = load.run(requests)
            if failed := [one.error for one in outcomes if one.error]:
                raise RuntimeError(f"{len(failed)} requests failed, such as: {failed[0]}")
            return sum(one.num_tokens for one in outcomes) / max(one.end_s for one in outcomes)

        rate(names)  # what is made on first use
        rate([])
        rounds = [(rate([]), rate(names)) for _ in range(args.repeats)]
    base, mixed = (statistics.median(values) for values in zip(*rounds, strict=True))
    what = f"{args.batch} at once, {args.input_len} in and {args.output_len} out"
    rows = [
        (f"{what}: the model's own", f"{base:.0f} tokens/s"),
        (f"the same with {args.adapters} adapters of rank {args.rank}", f"{mixed:.0f} tokens/s, {mixed / base:.2f}"),
    ]
    report("adapters", args.output, rows, {"base": base, "adapters": mixed, "rounds": rounds})
    return 0


def write_random_adapters(folders: list[Path], config: dict[str, int], rank: int) -> None:
    """As peft writes them, for all matrices of a dense model's attention and MLP; one is the other's equal."""
    sys.path.insert(0, str(ROOT / "test"))
    import torch
    from lora_adapters import ALL, write_adapter

    hidden, size, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (size, hidden), "mlp.up_proj": (size, hidden),
        "mlp.down_proj": (hidden, size),
    }  # fmt: skip
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in shapes.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = torch.randn(shape, dtype=torch.bfloat16) * 0.01
                tensors[f"{module}.lora_{part}.weight"] = values
    for folder in folders:
        write_adapter(folder, tensors, r=rank, lora_alpha=rank, target_modules=list(ALL))


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--adapters", type=int, default=16, help="how many")
    parser.add_argument("--rank", type=int, default=16, help="of each adapter")
    parser.add_argument("--batch", type=int, default=64, help="requests at once")
    parser.add_argument("--input-len", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--output-len", type=int, default=256, help="tokens of an output")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each kind")
    parser.add_argument("--tiny", action="store_true", help="the demo model on a CPU: not a measurement")
    args = parser.parse_args()
    if args.tiny:
        small = {"adapters": min(args.adapters, 4), "batch": min(args.batch, 8), "input_len": 16, "output_len": 8}
        args = argparse.Namespace(**vars(args) | small)
    return args


if __name__ == "__main__":
    sys.exit(main())
