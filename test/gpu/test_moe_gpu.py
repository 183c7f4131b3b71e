"""Owns the tests of whole blocks of experts on a GPU: kernels, in CUDA graphs too, give what torch gives."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import sharded_models as sm
import torch
from fake_gpu import RecordOutputs
from ramet.srt.configs.model_family import ExpertTraits
from ramet.srt.configs.moe_config import MoeConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers import fused_experts, moe
from ramet.srt.layers.moe import FusedMoE, SparseMoeBlock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE, HIDDEN = "cuda", 256
# All routers are float32: logits in bfloat16 are often equal, and which of two torch chooses then is not defined.
PLAIN = MoeConfig(
    num_experts=32,
    num_experts_per_tok=4,
    intermediate_size=128,
    norm_topk_prob=True,
    sparse_layers=(True,),
    traits=ExpertTraits(is_router_float32=True),
)
MODELS = {
    "softmax": PLAIN,
    "odd numbers": replace(PLAIN, num_experts=60, num_experts_per_tok=5, intermediate_size=44, norm_topk_prob=False),
    "shared with a gate": replace(
        PLAIN,
        traits=ExpertTraits(is_router_float32=True, shared="shared", shared_gate="shared_gate"),
        shared_intermediate_size=64,
    ),
    "sigmoid, bias, groups, shared": replace(
        PLAIN,
        traits=ExpertTraits(is_router_float32=True, scoring="sigmoid", correction_bias="bias", shared="shared"),
        scaling_factor=1.5,
        num_groups=4,
        num_kept_groups=2,
        shared_intermediate_size=64,
    ),
}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def make_block(model: MoeConfig, dtype: torch.dtype) -> SparseMoeBlock:
    """With the same random weights, rounded to bfloat16, in every type."""
    config = SimpleNamespace(hidden_size=HIDDEN, moe=model, traits=SimpleNamespace(hidden_act="silu"))
    block = SparseMoeBlock(config, "mlp", dtype, ParallelConfig())
    generator = torch.Generator().manual_seed(0)
    for module in block.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            value = torch.randn(weight.shape, generator=generator) / (
                weight.shape[-1] ** 0.5 if weight.dim() > 1 else 4
            )
            value = value.bfloat16().to(DEVICE, weight.dtype)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    return block


def make_inputs(num_tokens: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    x = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return x.bfloat16().to(DEVICE, dtype)


def run_by_torch(block: SparseMoeBlock, x: torch.Tensor) -> torch.Tensor:
    """As where there are no kernels, but for the products."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (moe, fused_experts):
            patch.setattr(module, "use_kernels", lambda x: False)
        return block(x)


def check(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """No row is off: one that went to another expert would be."""
    difference = (actual.float() - expected.float()).norm(dim=1)
    assert bool((difference <= 2 * bound * expected.float().norm(dim=1)).all())
    assert float(difference.norm()) <= bound * float(expected.float().norm())


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 64, 128, 129, 1000])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_give_what_torch_gives(num_tokens, model, dtype):
    block, x = make_block(model, dtype), make_inputs(num_tokens, dtype)
    actual = block(x)
    assert actual.dtype == dtype and actual.shape == x.shape
    check(actual, run_by_torch(block, x), BOUNDS[dtype])
    check(actual, run_by_torch(make_block(model, torch.float32), x.float()), BOUNDS[dtype])


@pytest.mark.parametrize("num_tokens", [1, 64, 200])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_follows_its_inputs(num_tokens, model, dtype):
    block, x = make_block(model, dtype), make_inputs(num_tokens, dtype)
    block(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(x)
    for seed in (2, 3, 4):
        x.copy_(make_inputs(num_tokens, dtype, seed))
        graph.replay()
        check(y, run_by_torch(block, x), BOUNDS[dtype])


@pytest.mark.parametrize("num_tokens", [1, 64, 200])
def test_the_ranks_parts_add_up(num_tokens):
    block, x = make_block(PLAIN, torch.float32), make_inputs(num_tokens, torch.float32)
    routing = block.gate(x)
    parts = []
    for parallel in sm.all_ranks(2, 2):
        part = FusedMoE(HIDDEN, PLAIN, "experts", activation="silu", dtype=torch.float32, parallel=parallel)
        mine = slice(part.first_expert, part.first_expert + part.num_local_experts)
        for name in ("w13_weight", "w2_weight"):
            setattr(part, name, torch.nn.Parameter(getattr(block.experts, name)[mine], requires_grad=False))
        parts.append(part(x, *routing))
    check(parts[0] + parts[1], run_by_torch(block, x), BOUNDS[torch.float32])


@pytest.mark.parametrize("num_tokens", [1, 64, 200])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_torch_sorts_and_adds_nothing(num_tokens, model):
    """Each of these would be a launch."""
    block, x = make_block(model, torch.bfloat16), make_inputs(num_tokens, torch.bfloat16)
    with RecordOutputs() as record:
        block(x)
    names = set(record.names)
    assert names & {"mm", "linear", "empty"}
    assert not names & {"topk", "sort", "searchsorted", "index", "add", "mul", "div", "sum", "sigmoid", "addcmul_"}
