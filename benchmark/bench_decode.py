"""Decoding against Hugging Face transformers on the same model, in one run, alternating, medians.

    python benchmark/bench_decode.py [--rounds 3] [--model-path FOLDER] [--input-len 128] [--output-len 64]

Batch 1: the decode rate of a request, from the times of an answer of one token and of a whole answer. 16 concurrent:
output tokens per second, prefill included, against transformers' one request after the other and its static batch of
16. The limit: memory read bandwidth over the bytes of the weights, which every decoded token has to read once.
"""

import concurrent.futures
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench_common import Server, bench_model, make_parser, random_prompt, report, running, weights_nbytes

NUM_CONCURRENT = 16


def time_ours(server: Server, prompts: list[list[int]], output_len: int) -> float:
    """Seconds until the server has answered all prompts, sent at the same time."""

    def ask(prompt: list[int]) -> None:
        sampling = {"temperature": 0, "max_new_tokens": output_len, "ignore_eos": True}
        answer = server.call("/generate", {"input_ids": prompt, "sampling_params": sampling})
        assert answer["meta_info"]["completion_tokens"] == output_len

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        start = time.perf_counter()
        list(pool.map(ask, prompts))
        return time.perf_counter() - start


def time_transformers(model: Any, prompts: list[list[int]], output_len: int) -> float:
    """Seconds of transformers' generate on one batch of equally long prompts."""
    import torch

    ids = torch.tensor(prompts)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            do_sample=False,
            pad_token_id=0,
        )
    seconds = time.perf_counter() - start
    assert output.shape[1] == ids.shape[1] + output_len
    return seconds


def read_bandwidth() -> float:
    """Bytes per second at which all of torch's threads together read touched memory: the best of some sums."""
    import torch

    data = torch.ones(1 << 28, dtype=torch.float32)
    best = 0.0
    for _ in range(7):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def measure(server: Server, model: Any, args: Any) -> dict[str, list[float]]:
    """Rounds of all measurements; ours and transformers' take turns."""
    generator = random.Random(0)
    vocab_size = model.config.vocab_size

    def prompts(count: int) -> list[list[int]]:
        """Fresh ones each time, so that no prefix cache helps."""
        return [random_prompt(args.input_len, vocab_size, generator) for _ in range(count)]

    times: dict[str, list[float]] = {}
    sides = {"ours": lambda p, n: time_ours(server, p, n), "hf": lambda p, n: time_transformers(model, p, n)}
    for side in sides.values():
        side(prompts(1), 4)  # warm-up
    for _ in range(args.rounds):
        for case, count, length in (("one", 1, 1), ("whole", 1, args.output_len), ("many", 16, args.output_len)):
            for name, side in sides.items():
                times.setdefault(f"{name}_{case}", []).append(side(prompts(count), length))
    return times


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--input-len", type=int, default=128, help="tokens")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    args = parser.parse_args()
    folder: Path = bench_model(args.model_path)
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).eval()
    limit = read_bandwidth() / weights_nbytes(folder)
    with running(folder, *args.server_flags) as server:
        times = measure(server, model, args)

    steps = args.output_len - 1
    decode = {s: median([steps / (w - o) for w, o in zip(times[f"{s}_whole"], times[f"{s}_one"], strict=True)])
              for s in ("ours", "hf")}  # fmt: skip
    prefill = {s: median(times[f"{s}_one"]) for s in ("ours", "hf")}
    many = {s: median([NUM_CONCURRENT * args.output_len / t for t in times[f"{s}_many"]]) for s in ("ours", "hf")}
    sequential = median([args.output_len / t for t in times["hf_whole"]])
    rows = [
        ("model", f"{folder.name}, {weights_nbytes(folder) / 1e9:.2f} GB, {args.input_len} in, {args.output_len} out"),
        ("decode at batch 1", f"{decode['ours']:.1f} tokens/s; transformers {decode['hf']:.1f}"),
        ("limit by memory bandwidth", f"{limit:.1f} tokens/s; reached {decode['ours'] / limit:.0%}"),
        ("first token", f"{prefill['ours'] * 1e3:.0f} ms; transformers {prefill['hf'] * 1e3:.0f} ms"),
        ("16 concurrent", f"{many['ours']:.1f} tokens/s; transformers' batch of 16 {many['hf']:.1f}"),
        ("against one after the other", f"{many['ours'] / sequential:.2f} x transformers' {sequential:.1f} tokens/s"),
    ]
    values = {"decode": decode, "first_token_s": prefill, "concurrent": many, "sequential": sequential, "limit": limit}
    report("decode", args.output, rows, values | {"times": times, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
