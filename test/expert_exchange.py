"""A rank of a layer of experts under data-parallel attention, which exchanges tokens with others that are as real.

    python test/expert_exchange.py RANK FOLDER cpu|cuda

It ends with an error if its own tokens do not get what a single rank gives them.
"""

import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace

import sharded_models as sm
import torch
import torch.distributed as dist
import toy_model as toy
from ramet.srt.configs.model_family import ExpertTraits
from ramet.srt.configs.moe_config import MoeConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.distributed.parallel_state import init_process_groups
from ramet.srt.layers.moe import SparseMoeBlock
from ramet.srt.models.decoder import DecoderLayer

HIDDEN, EXPERTS, TOP_K, NUM_RANKS = 16, 8, 2, 4
MOE = MoeConfig(
    num_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    intermediate_size=12,
    norm_topk_prob=True,
    sparse_layers=(True,),
    shared_intermediate_size=8,
    traits=ExpertTraits(shared="shared"),
)
CONFIG = SimpleNamespace(hidden_size=HIDDEN, moe=MOE, traits=SimpleNamespace(hidden_act="silu"))
TOPOLOGIES = [  # with a group for each rank, and with two ranks in each; experts whole, and split
    {"tp_size": 4, "ep_size": 4, "attn_dp_size": 4},
    {"tp_size": 4, "ep_size": 2, "attn_dp_size": 2},
    {"tp_size": 4, "ep_size": 1, "attn_dp_size": 4},
]
GPU_TOPOLOGIES = [{"tp_size": 2, "ep_size": 2, "attn_dp_size": 2}, {"tp_size": 2, "attn_dp_size": 2}]
SIZES = [9, 1, 4, 30]  # of the groups: as many as there are


def make_block(parallel: ParallelConfig) -> SparseMoeBlock:
    block = SparseMoeBlock(CONFIG, "mlp", torch.float32, parallel)
    tensors = sm.random_checkpoint(
        sm.checkpoint_shapes([SparseMoeBlock(CONFIG, "mlp", torch.float32, ParallelConfig())])
    )
    for name, value in toy.expected_tensors(block, tensors).items():
        module, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(module), attribute, torch.nn.Parameter(value, requires_grad=False))
    return block


def make_tokens(num_tokens: int, router: torch.Tensor, is_skewed: bool) -> torch.Tensor:
    """Every other one for the last expert, with `is_skewed`."""
    x = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(5))
    if is_skewed:
        x[::2] += 100 * (router[-1] / router[-1].norm()).cpu()
    return x.to(router.device)


def run_rank(rank: int, folder: str, device: str) -> None:
    """All topologies of the device, one after the other; on GPUs in graphs, of groups padded to the same size."""
    torch.set_num_threads(1)
    topologies = TOPOLOGIES if device == "cpu" else GPU_TOPOLOGIES
    if device == "cuda":
        torch.cuda.set_device(rank)
    for number, sizes in enumerate(topologies):
        parallel = ParallelConfig.of_rank(rank, **sizes)
        store = dist.FileStore(f"{folder}/{number}", parallel.world_size)
        init_process_groups(parallel, store, "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", 60)
        groups, own = SIZES[: parallel.attn_dp_size], parallel.attn_dp_rank
        if device == "cuda":
            groups = [max(groups)] * len(groups)
        block, whole = make_block(parallel).to(device), make_block(ParallelConfig()).to(device)
        first = sum(groups[:own])
        mine = slice(first, first + groups[own])
        batch = SimpleNamespace(group_sizes=groups, own_group=own)
        x = make_tokens(sum(groups), whole.gate.weight, is_skewed=False)
        run = functools.partial(DecoderLayer._run_mlp, SimpleNamespace(mlp_name="mlp", mlp=block), x[mine], batch)
        replay = run if device == "cpu" else in_graph(run)
        for is_skewed in (False, True):
            x.copy_(make_tokens(sum(groups), whole.gate.weight, is_skewed))
            ids = whole.gate(x)[1]
            share = float((ids == EXPERTS - 1).any(dim=1).float().mean())
            assert share > 0.5 if is_skewed else 0.05 < share < 0.5, share
            check(replay(), whole(x)[mine])
        dist.destroy_process_group()


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """No token is off: one that went to another expert, or to another rank, would be."""
    assert actual.shape == expected.shape
    difference = (actual - expected).norm(dim=1)
    assert bool((difference <= 1e-5 * expected.norm(dim=1)).all()), difference


def in_graph(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """What replays a captured run and gives its result."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return y

    return replay


if __name__ == "__main__":
    with torch.inference_mode():
        run_rank(int(sys.argv[1]), *sys.argv[2:])
