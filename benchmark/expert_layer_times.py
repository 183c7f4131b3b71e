"""Owns the timing of one layer of experts on two GPUs, as one of their processes: bench_experts.py starts both."""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from ramet.srt.configs.moe_config import MoeConfig  # noqa: E402 - its folder is made importable above
from ramet.srt.configs.parallel_config import ParallelConfig  # noqa: E402
from ramet.srt.distributed.communication_op import (  # noqa: E402
    gather_attention_groups,
    sum_for_attention_groups,
)
from ramet.srt.distributed.parallel_state import init_process_groups  # noqa: E402
from ramet.srt.layers.kernels.split_sums import counts_of  # noqa: E402
from ramet.srt.layers.moe import SparseMoeBlock  # noqa: E402

TIMEOUT_S = 120.0
NUM_RUNS = 8  # in a graph: layers with weights of their own follow each other


@torch.inference_mode()
def time_layers(
    rank: int, store: str, output: str, shape: dict[str, Any], numbers: Sequence[int], num_timed: int
) -> None:
    """Time all cases with the other rank; rank 0 writes what it has found, as JSON by case."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    counts_of(device)
    parallel = ParallelConfig.of_rank(rank, tp_size=2, ep_size=2, attn_dp_size=2)
    init_process_groups(parallel, dist.FileStore(store, 2), "cpu:gloo,cuda:nccl", TIMEOUT_S)
    blocks = [_make_block(shape, parallel, device, seed) for seed in range(NUM_RUNS)]
    results: dict[str, Any] = {}
    for number in numbers:
        for routing in ("balanced", "skewed"):
            x = _tokens(number, blocks, is_skewed=routing == "skewed")
            hit = [_experts_hit(block, x) for block in blocks]
            expert_bytes = 2 * 3 * shape["hidden_size"] * shape["moe_intermediate_size"]
            token_bytes = 2 * number * shape["hidden_size"]
            sizes = [number // 2] * 2
            mine = x[rank * number // 2 : (rank + 1) * number // 2].contiguous()
            ways: dict[str, Callable[[SparseMoeBlock], torch.Tensor]] = {
                "one sum": lambda block, x=x: block(x),
                "an exchange each way": lambda block, mine=mine, sizes=sizes: sum_for_attention_groups(
                    block.partial(gather_attention_groups(mine, sizes)), sizes, rank
                ),
            }
            for way, run in ways.items():
                seconds = _time(run, blocks, num_timed)
                results[f"{number} tokens, {routing}, {way}"] = {
                    "us": seconds * 1e6,
                    "read_bytes": statistics.mean(hit) * expert_bytes,
                    "sent_bytes": token_bytes,
                }
    if rank == 0:
        Path(output).write_text(json.dumps(results))
    dist.destroy_process_group()


def _make_block(shape: dict[str, Any], parallel: ParallelConfig, device: torch.device, seed: int) -> SparseMoeBlock:
    """With random weights; the router's are equal on both ranks."""
    moe = MoeConfig(
        num_experts=shape["num_experts"],
        num_experts_per_tok=shape["num_experts_per_tok"],
        intermediate_size=shape["moe_intermediate_size"],
        norm_topk_prob=shape["norm_topk_prob"],
        sparse_layers=(True,),
    )
    traits = SimpleNamespace(hidden_act=shape["hidden_act"])
    config: Any = SimpleNamespace(hidden_size=shape["hidden_size"], moe=moe, traits=traits)
    block = SparseMoeBlock(config, "mlp", torch.bfloat16, parallel)
    generator = torch.Generator(device).manual_seed(seed)
    for module in block.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            values = torch.empty(weight.shape, dtype=weight.dtype, device=device).normal_(std=0.02, generator=generator)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    return block


def _tokens(number: int, blocks: Sequence[SparseMoeBlock], is_skewed: bool) -> torch.Tensor:
    """Random ones, equal on both ranks; with `is_skewed` every other one goes to expert 0 of every layer."""
    router = blocks[0].gate.weight
    generator = torch.Generator(router.device).manual_seed(number)
    x = torch.randn((number, router.shape[1]), generator=generator, dtype=torch.bfloat16, device=router.device)
    if is_skewed:
        for block in blocks:
            block.gate.weight.data[0] = router[0]
        x[::2] += 20 * router[0] / router[0].norm()
    return x


def _experts_hit(block: SparseMoeBlock, x: torch.Tensor) -> int:
    """How many of this rank's experts the tokens go to."""
    ids = block.gate(x)[1] - block.experts.first_expert
    return int(ids[(ids >= 0) & (ids < block.experts.num_local_experts)].unique().numel())


def _time(run: Callable[[SparseMoeBlock], torch.Tensor], blocks: Sequence[SparseMoeBlock], num_timed: int) -> float:
    """Seconds of one layer, the median of some replays of a graph of several."""
    for block in blocks:
        run(block)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for block in blocks:
            run(block)
    times = []
    for _ in range(num_timed):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(blocks)
