"""Compares the two ways to multiply by bfloat16 weights on a CPU: the library's and layers/cpu_matmul.py's.

python benchmark/bench_cpu_matmul.py [--threads 1] [--repeats 5]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from ramet.srt.layers import cpu_matmul  # noqa: E402 - its folder is made importable above

SHAPES = ((9728, 896), (896, 4864))  # output and input size: a 0.5 B model's gate_up_proj and down_proj
NUM_ROWS = (1, 8, 12, 16, 64, 256, 2048)
NUM_WEIGHTS = 12  # of each shape, so that they don't stay in the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"native bfloat16 instructions: {not cpu_matmul.lacks_instructions(torch.bfloat16)}")
    print("| weights | rows | library, GFLOP/s | ours, GFLOP/s | ratio |\n|---|---|---|---|---|")
    with torch.inference_mode():
        for output_size, input_size in SHAPES:
            weights = [torch.randn((output_size, input_size)).bfloat16() for _ in range(NUM_WEIGHTS)]
            for num_rows in NUM_ROWS:
                x = torch.randn((num_rows, input_size)).bfloat16()
                times: dict[str, list[float]] = {"library": [], "ours": []}
                for _ in range(args.repeats):
                    for name, function in (("library", F.linear), ("ours", cpu_matmul.widening_linear)):
                        start = time.perf_counter()
                        for weight in weights:
                            function(x, weight)
                        times[name].append(time.perf_counter() - start)
                flops = 2 * num_rows * output_size * input_size * NUM_WEIGHTS
                library, ours = (statistics.median(times[name]) for name in ("library", "ours"))
                print(
                    f"| {output_size} x {input_size} | {num_rows} | {flops / library / 1e9:.1f} | "
                    f"{flops / ours / 1e9:.1f} | {library / ours:.2f} |"
                )


if __name__ == "__main__":
    main()
