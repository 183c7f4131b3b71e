"""Compares the ways to multiply by bfloat16 weights on a CPU: PyTorch's library, layers/cpu_matmul.py, and the kernels.

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
from ramet.srt.layers.cpu_kernels import build, library, ops  # noqa: E402

SHAPES = ((9728, 896), (896, 4864))  # output and input size: a 0.5 B model's gate_up_proj and down_proj
NUM_ROWS = (1, 8, 12, 16, 64, 256, 2048)
NUM_WEIGHTS = 12  # of each shape, so that they don't stay in the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    library.load(build.build(), args.threads)
    ways = {"PyTorch": F.linear, "widened blocks": cpu_matmul.widening_linear, "kernels": ops.linear}
    print(f"native bfloat16 instructions: {not cpu_matmul.lacks_instructions(torch.bfloat16)}")
    print(f"| weights | rows | {', '.join(ways)}, GFLOP/s | kernels' weights, GB/s | kernels to PyTorch |")
    print("|---|---|---|---|---|")
    with torch.inference_mode():
        for output_size, input_size in SHAPES:
            weights = [torch.randn((output_size, input_size)).bfloat16() for _ in range(NUM_WEIGHTS)]
            for num_rows in NUM_ROWS:
                x = torch.randn((num_rows, input_size)).bfloat16()
                times: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(args.repeats):
                    for name, multiply in ways.items():
                        start = time.perf_counter()
                        for weight in weights:
                            multiply(x, weight)
                        times[name].append(time.perf_counter() - start)
                seconds = {name: statistics.median(one) / NUM_WEIGHTS for name, one in times.items()}
                size = output_size * input_size
                rates = ", ".join(f"{2e-9 * num_rows * size / one:.1f}" for one in seconds.values())
                print(
                    f"| {output_size} x {input_size} | {num_rows} | {rates} | {2e-9 * size / seconds['kernels']:.1f} | "
                    f"{seconds['PyTorch'] / seconds['kernels']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
