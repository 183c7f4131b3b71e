"""How fast latent attention is on a GPU: decoding against the memory's rate, prompt chunks over rows and expanded.

    python benchmark/bench_latent.py [--heads 16,64,128] [--output FILE] [--write-model FOLDER [--sparse]]

Rows of 576 columns of which 512 are values, in bfloat16, as DeepSeek-V3, Kimi-K2 and GLM-4.7-Flash have them. Decoding
is measured with 64 requests of 8192 tokens, and with as many tokens in mixed lengths; the rate is that of the rows that
are read once, beside that of a plain copy. Chunks have 2048 new tokens alone and behind 8192 others.

With a sparse index as DeepSeek-V3.2 has it (64 heads of 128, the best 2048 keys): what scoring the keys, choosing among
them and attending to the chosen take, by one layer, for a token of each of 1 and of 64 requests of 8192 and of 65,536
tokens, of one of 65,536 among 63 of 8192, and for a chunk of 2048 behind 8192 and 63,488, beside attention to all rows.

`--write-model` measures nothing: it writes a model folder without weights, of DeepSeek-V3's widths and format in fewer
layers and experts, that the other benchmarks serve with made-up weights:

    python benchmark/bench_latent.py --write-model out/latent
    python benchmark/profile_decode.py --model-path out/latent -- --load-format dummy

With `--sparse` it is DeepSeek-V3.2's.

Prints a table.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from bench_common import ROOT, report
from gpu_model import LATENT_SHAPE, SPARSE_KEYS, write_config, write_large_tokenizer

PAGE_SIZE = 16
LONG = 8192
NUM_REQUESTS = 64
MIXED = [65536, 65536, 32768, 32768, *[8192] * 20, *[4096] * 24, *[3413] * 16]  # as many tokens, about
CHUNK = 2048
SPARSE = {  # (tokens before, new tokens) of each sequence
    **{f"{number} x {length}": [(length - 1, 1)] * number for number in (1, NUM_REQUESTS) for length in (LONG, 65536)},
    "1 x 65536 among 63 x 8192": [(65535, 1), *[(LONG - 1, 1)] * 63],
    **{f"{CHUNK} tokens behind {prefix}": [(prefix, CHUNK)] for prefix in (LONG, 63488)},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="16,64,128", help="of the rank, one run for each number")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("--write-model", type=Path, help="write a model folder, and end")
    parser.add_argument("--sparse", action="store_true", help="write a model with a sparse index")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.write_model is not None:
        shape = LATENT_SHAPE | SPARSE_KEYS if args.sparse else LATENT_SHAPE
        write_large_tokenizer(write_config(args.write_model, shape), shape["vocab_size"])
        return 0
    sys.path.insert(0, str(ROOT / "test"))
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench_latent.py measures on a GPU, and there is none")
    device = torch.device("cuda", 0)
    copy = copy_rate(device)
    rows, values = [("a plain copy", f"{copy / 1e9:.0f} GB/s")], {"copy": copy}
    for heads in map(int, args.heads.split(",")):
        for name, lengths in (("alike", [LONG] * NUM_REQUESTS), ("mixed", MIXED)):
            seconds = measure_decode(device, heads, lengths)
            rate = sum(lengths) * 576 * 2 / seconds
            flops = sum(lengths) * heads * (576 + 512) * 2 / seconds
            rows.append(
                (
                    f"decode, {heads} heads, {name}",
                    f"{seconds * 1e6:.0f} µs, {rate / 1e9:.0f} GB/s ({rate / copy:.0%}), {flops / 1e12:.0f} TFLOP/s",
                )
            )
            values[f"decode_{heads}_{name}"] = rate / copy
        for prefix in (0, LONG):
            over_rows, expanded = (measure_chunk(device, heads, prefix, is_expanded=one) for one in (False, True))
            rows.append((f"{CHUNK} tokens behind {prefix}, {heads} heads",
                         f"over rows {over_rows * 1e3:.2f} ms, expanded {expanded * 1e3:.2f} ms"))  # fmt: skip
            values[f"chunk_{heads}_{prefix}"] = [over_rows, expanded]
        for name, sequences in SPARSE.items():
            parts = measure_sparse(device, heads, sequences)
            rows.append((f"sparse, {name}, {heads} heads",
                         ", ".join(f"{part} {seconds * 1e6:.0f} µs" for part, seconds in parts.items())))  # fmt: skip
            values[f"sparse_{heads}_{name}"] = parts
    report("latent", args.output, rows, values)
    return 0


def copy_rate(device: Any) -> float:
    """Bytes read and written in a second by a plain copy."""
    import torch
    from gpu_timing import time_on

    source, target = (torch.empty(4 << 30, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * source.nbytes / statistics.median(time_on(device, lambda: target.copy_(source), 10))


def measure_decode(device: Any, heads: int, lengths: list[int]) -> float:
    """Seconds of one layer's attention for one token of each request."""
    import torch
    from attention_case import Case
    from gpu_timing import time_on
    from ramet.srt.layers.attention.latent_triton_backend import LatentTritonAttnBackend

    sequences = [(length - 1, 1) for length in lengths]
    options = {"rank": 512, "page_size": PAGE_SIZE, "dtype": torch.bfloat16, "decode": True}
    case = Case(device, sequences, (heads, 1, 576), **options)
    backend = LatentTritonAttnBackend(case.spec, case.pool)
    backend.init_forward_metadata(case.batch)
    return statistics.median(time_on(device, lambda: backend.forward(case.q, case.layer.layer, case.batch), 20))


def measure_sparse(device: Any, heads: int, sequences: list[tuple[int, int]]) -> dict[str, float]:
    """Seconds of one layer's scores and choice, attention to the chosen keys, and attention to all."""
    import dataclasses

    import torch
    from attention_case import Case
    from gpu_timing import time_on
    from ramet.srt.configs.index_config import IndexTraits
    from ramet.srt.layers.attention.latent_triton_backend import LatentTritonAttnBackend
    from ramet.srt.layers.attention.sparse_triton_backend import SparseTritonAttnBackend
    from ramet.srt.layers.kernels.choose_keys import choose_keys
    from ramet.srt.layers.kernels.index_scores import index_scores

    index = IndexTraits(num_heads=64, head_dim=128, top_k=2048, is_interleaved=False)
    options = {"rank": 512, "page_size": PAGE_SIZE, "dtype": torch.bfloat16, "decode": sequences[0][1] == 1}
    case = Case(device, sequences, (heads, 1, 576), index=index, **options)
    q = torch.randn(len(case.q), 64, 128, dtype=torch.bfloat16, device=device)
    weights = torch.randn(len(case.q), 64, device=device)
    backend = SparseTritonAttnBackend(case.spec, case.pool)
    dense = LatentTritonAttnBackend(dataclasses.replace(case.spec, latent=None), case.pool)
    for one in (backend, dense):
        one.init_forward_metadata(case.batch)
    some = slice(0, 256)  # of a chunk whose scores are made some tokens at a time
    scores = torch.empty((len(q[some]), sum(max(sequences))), dtype=torch.float32, device=device)
    places = case.batch.req_to_page, backend._rows[some], case.batch.positions[some]
    layer = case.layer.layer

    def score() -> None:
        keys = case.pool.get_index_keys(0)
        index_scores(q[some], weights[some], keys, *places, scores, top_k=index.top_k, page_size=PAGE_SIZE)

    chosen = torch.empty((len(q[some]), index.top_k), dtype=torch.int32, device=device)
    runs = {
        f"scores of {len(scores)} tokens": score,
        "their choice": lambda: choose_keys(scores, *places, chosen, page_size=PAGE_SIZE),
        "scores and choice": lambda: backend.choose(q, weights, 0, case.batch),
        "attention": lambda: backend.forward(case.q, layer, case.batch),
        "to all keys": lambda: dense.forward(case.q, layer, case.batch),
    }
    return {name: statistics.median(time_on(device, run, 10)) for name, run in runs.items()}


def measure_chunk(device: Any, heads: int, prefix: int, *, is_expanded: bool) -> float:
    """Seconds of one layer's attention for a chunk, with the products of queries, keys and values by kv_b_proj."""
    import dataclasses

    import torch
    from attention_case import Case
    from gpu_timing import time_on
    from ramet.srt.configs.latent_config import LatentTraits
    from ramet.srt.configs.parallel_config import ParallelConfig
    from ramet.srt.layers.attention.latent_triton_backend import LatentTritonAttnBackend
    from ramet.srt.layers.latent_linear import LatentHeads

    latent = LatentTraits(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, is_interleaved=True)
    case = Case(device, [(prefix, CHUNK)], (heads, 1, 576), rank=512, page_size=PAGE_SIZE, dtype=torch.bfloat16)
    kv_b = LatentHeads(latent, heads, "kv_b_proj", dtype=torch.bfloat16, parallel=ParallelConfig())
    weight = torch.randn(kv_b.weight.shape, dtype=torch.bfloat16, device=device)
    kv_b.weight = torch.nn.Parameter(weight, requires_grad=False)
    q = torch.randn(CHUNK, heads, latent.query_dim, dtype=torch.bfloat16, device=device)
    out = q.new_empty((CHUNK, heads, latent.value_dim))
    backend = LatentTritonAttnBackend(dataclasses.replace(case.spec, latent=latent if is_expanded else None), case.pool)
    backend.init_forward_metadata(case.batch)
    cache = case.pool.get_kv_buffer(0)[0]

    def run() -> None:
        if backend.expanded is not None:
            backend.expanded.run(q, cache, kv_b, case.layer.scale, out)
            return
        kv_b.take_queries(q[..., :128], case.q[..., :512])
        kv_b.take_results(backend.forward(case.q, case.layer.layer, case.batch))

    return statistics.median(time_on(device, run, 10))


if __name__ == "__main__":
    sys.exit(main())
