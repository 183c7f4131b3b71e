"""Owns the tests of the mixture-of-experts layer: its numbers, and that all ranks together give them."""

import pytest
import random_models as rm
import sharded_models as sm
import torch
import torch.nn.functional as F
import toy_model as toy
from engine_harness import EngineHarness
from fake_gpu import RecordOutputs, fake_gpu
from fp8_models import fp8_weight
from ramet.srt.configs.moe_config import MoeConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.weight_format import fp8_rows
from ramet.srt.layers import grouped_linear as gl
from ramet.srt.layers.activation import get_activation
from ramet.srt.layers.fused_experts import fused_experts
from ramet.srt.layers.moe import FusedMoE, TopKRouter
from ramet.srt.layers.quantization.declare import declare_format
from ramet.srt.layers.quantization.weight import layout_attribute
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

HIDDEN, SIZE, EXPERTS, TOP_K = 32, 48, 8, 3
MOE = MoeConfig(
    num_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    intermediate_size=SIZE,
    norm_topk_prob=True,
    sparse_layers=(True,),
)
NAMES = MOE.traits.names
SHARDED = [topology for topology in sm.TOPOLOGIES if topology != (1, 1)]


@pytest.fixture(params=["in turn", "grouped"])
def algorithm(request, monkeypatch):
    """Expert by expert, or by torch's grouped product, which is meant for GPUs and runs on CPUs too."""
    if request.param == "grouped":
        monkeypatch.setattr("ramet.srt.layers.fused_experts.needs_host", lambda *args: False)
        monkeypatch.setattr(gl, "_torch_takes", lambda *args: True)


def make_experts(parallel: ParallelConfig, dtype: torch.dtype = torch.float32) -> FusedMoE:
    return FusedMoE(HIDDEN, MOE, "experts", activation="silu", dtype=dtype, parallel=parallel)


def placed(layer: FusedMoE, device: str) -> FusedMoE:
    """With weights of any values."""
    for name, weight in layer.named_parameters():
        empty = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        setattr(layer, name, torch.nn.Parameter(empty, requires_grad=False))
    return layer


def checkpoint() -> dict[str, torch.Tensor]:
    return sm.random_checkpoint(sm.checkpoint_shapes([make_experts(ParallelConfig())]))


def filled(layer: FusedMoE, tensors: dict[str, torch.Tensor]) -> FusedMoE:
    for name, value in toy.expected_tensors(layer, tensors).items():
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
    return layer


def quantise(layer: FusedMoE) -> None:
    """To fp8 by row."""
    for name in ("w13_weight", "w2_weight"):
        weight = fp8_weight(getattr(layer, name))
        setattr(layer, layout_attribute(name), weight.layout)
        setattr(layer, name, torch.nn.Parameter(weight.values, requires_grad=False))
        setattr(layer, f"{name}_scale", torch.nn.Parameter(weight.scales, requires_grad=False))


def reference(
    tensors: dict[str, torch.Tensor], x: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor
) -> torch.Tensor:
    """Token by token, from the checkpoint's tensors."""
    y = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], expert_ids[token].tolist(), strict=True):
            gate, up, down = (tensors[f"experts.{expert}.{name}.weight"] for name in NAMES)
            y[token] += weight * (down @ (F.silu(gate @ x[token]) * (up @ x[token])))
    return y


def routing(num_tokens: int, experts: list[int], seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random inputs whose tokens go to TOP_K of `experts`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator)
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    orders = [torch.randperm(len(experts), generator=generator)[:TOP_K] for _ in range(num_tokens)]
    ids = torch.tensor(experts)[torch.stack(orders)] if orders else torch.zeros(0, TOP_K, dtype=torch.int64)
    return x, weights, ids


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 200])
@pytest.mark.parametrize("experts", [list(range(EXPERTS)), [0, 1, 2], [5, 6, 7]])
def test_experts_equal_the_formula(num_tokens, experts):
    tensors = checkpoint()
    x, weights, ids = routing(num_tokens, experts)
    y = filled(make_experts(ParallelConfig()), tensors)(x, weights, ids)
    torch.testing.assert_close(y, reference(tensors, x, weights, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("topology", SHARDED, ids=sm.topology_name)
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
@pytest.mark.parametrize("experts", [list(range(EXPERTS)), [0, 1, 2]])  # the second leaves ranks without tokens
def test_the_ranks_parts_add_up(topology, num_tokens, experts):
    tensors = checkpoint()
    inputs = routing(num_tokens, experts)
    whole = filled(make_experts(ParallelConfig()), tensors)(*inputs)
    # With no process group the layer returns its own part.
    parts = [filled(make_experts(parallel), tensors)(*inputs) for parallel in sm.all_ranks(*topology)]
    torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=1e-5)
    if num_tokens and topology == (4, 4) and experts == [0, 1, 2]:
        assert not parts[2].any() and not parts[3].any()


@pytest.mark.usefixtures("algorithm")
def test_half_precision_sums_in_float32():
    tensors = checkpoint()
    x, weights, ids = routing(30, list(range(EXPERTS)))
    y = filled(make_experts(ParallelConfig(), torch.bfloat16), tensors)(x.bfloat16(), weights, ids)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference(tensors, x, weights, ids), atol=0.02, rtol=0.05)


@pytest.mark.usefixtures("algorithm")
def test_ids_of_other_ranks_add_nothing():
    x, weights, _ = routing(4, list(range(EXPERTS)))
    layer = filled(make_experts(ParallelConfig()), checkpoint())
    ids = torch.tensor([[-1, EXPERTS, 2], [-5, -1, EXPERTS + 9], [2, 2, -1], [0, 1, EXPERTS]])
    y = fused_experts(x, layer.w13_weight, layer.w2_weight, weights, ids, get_activation("silu"))
    known = (ids >= 0) & (ids < EXPERTS)
    expected = layer(x, weights * known, ids.where(known, 0))
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)
    assert not y[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_experts_are_near_the_exact_ones(dtype):
    """Rounding to three bits changes a weight by 2.6 % on average, and three matrices are in each result."""
    tensors = checkpoint()
    x, weights, ids = routing(60, list(range(EXPERTS)))
    layer = filled(make_experts(ParallelConfig(), dtype), tensors)
    quantise(layer)
    y, exact = layer(x.to(dtype), weights, ids), reference(tensors, x, weights, ids)
    assert y.dtype == dtype
    assert 0.01 < (y.float() - exact).norm() / exact.norm() < 0.06


def test_fp8_experts_in_float16_hold_an_outlier_channel():
    """The sums of values before their scale, up to 448 each, would be more than float16 holds."""
    x, weights, ids = routing(8, list(range(EXPERTS)))
    x[:, 3] = 600
    layer = filled(make_experts(ParallelConfig()), checkpoint())
    exact = layer(x, weights, ids)
    quantise(layer)
    y = layer(x.half(), weights, ids)
    assert (y.float() - exact).norm() / exact.norm() < 0.06


def test_a_cpu_gathers_the_rows_of_one_expert_at_a_time():
    """All assignments are in memory at once in the experts' outputs alone."""
    num_tokens = 1000
    inputs = routing(num_tokens, list(range(EXPERTS)))
    layer = filled(make_experts(ParallelConfig()), checkpoint())
    with RecordOutputs() as record:
        layer(*inputs)
    sizes = {output.untyped_storage().data_ptr(): output.untyped_storage().nbytes() for output in record.outputs}
    parts = num_tokens * TOP_K * HIDDEN * 4
    assert sum(size >= parts for size in sizes.values()) == 1 and max(sizes.values()) == parts


@pytest.mark.parametrize(
    ("capability", "triton", "kinds"),
    [
        ((9, 0), False, {"bfloat16"}),
        ((10, 0), False, {"bfloat16"}),
        ((8, 0), False, set()),
        ((9, 0), True, {"bfloat16", "float16", "fp8"}),
        ((8, 0), True, {"bfloat16", "float16", "fp8"}),
    ],
)
def test_which_experts_a_graph_can_hold(monkeypatch, capability, triton, kinds):
    with fake_gpu(monkeypatch, capability, has_triton=triton):
        for kind in ("bfloat16", "float16", "fp8"):
            dtype = torch.float16 if kind == "float16" else torch.bfloat16
            layer = make_experts(ParallelConfig(), dtype)
            if kind == "fp8":
                for name in layer.quantisable_weights:
                    declare_format(layer, name, fp8_rows(), "cpu")
            needs_host = placed(layer, "cuda").needs_host(dtype)
            assert needs_host == (kind not in kinds)


@pytest.mark.usefixtures("algorithm")
def test_what_the_experts_ask_of_the_host(request):
    """A fake tensor has no values: whatever asks for them raises, as it does while a graph is captured."""
    with FakeTensorMode():
        layer = placed(make_experts(ParallelConfig(), torch.bfloat16), "cpu")
        x = torch.empty(16, HIDDEN, dtype=torch.bfloat16)
        weights, ids = torch.empty(16, TOP_K), torch.empty(16, TOP_K, dtype=torch.int64)
        if "grouped" in request.node.name:
            assert layer(x, weights, ids).shape == x.shape
        else:
            assert layer.needs_host(x.dtype)
            with pytest.raises(DataDependentOutputException):
                layer(x, weights, ids)


@pytest.mark.parametrize(("family", "expected"), [("llama3", True), ("qwen3_moe", False)])
def test_the_runner_captures_no_experts_that_need_the_host(monkeypatch, tmp_path, family, expected):
    """On a CPU all do."""
    runner = EngineHarness(rm.make_model(tmp_path, family)).runner
    monkeypatch.setattr(type(runner.attn_backend), "can_be_captured", True)
    assert runner.can_be_captured is expected


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router(norm_topk_prob, dtype):
    moe = MoeConfig(**(vars(MOE) | {"norm_topk_prob": norm_topk_prob}))
    router = TopKRouter(HIDDEN, moe, "mlp", dtype=dtype)
    assert router.weight.boxes[0].checkpoint_name == "mlp.gate.weight"
    weight = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    router.weight = torch.nn.Parameter(weight, requires_grad=False)
    x = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights, ids = router(x)
    assert (weights.dtype, ids.dtype, weights.shape, ids.shape) == (torch.float32, torch.int64, *[(20, TOP_K)] * 2)
    logits = F.linear(x, weight).float()
    chosen = logits.gather(1, ids)
    assert torch.equal(chosen, logits.topk(TOP_K).values)
    expected = chosen.softmax(-1) if norm_topk_prob else logits.softmax(-1).gather(1, ids)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(
    ("tp_size", "ep_size", "moe", "message"),
    [
        (8, 8, {"num_experts": 12}, "--ep-size 8 does not divide the model's 12 experts"),
        (2, 1, {"intermediate_size": 5}, "--tp-size 2 / --ep-size 1 = 2 does not divide the experts' .* size 5"),
        (4, 2, {"intermediate_size": 5}, "--tp-size 4 / --ep-size 2 = 2 does not divide"),
    ],
)
def test_a_split_that_does_not_divide_is_refused(tp_size, ep_size, moe, message):
    moe = MoeConfig(**(vars(MOE) | moe))
    with pytest.raises(ValueError, match=message):
        FusedMoE(
            HIDDEN,
            moe,
            "experts",
            activation="silu",
            dtype=torch.float32,
            parallel=sm.all_ranks(tp_size, ep_size)[0],
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp_size": 4, "ep_size": 3}, "ep_size 3 does not divide tp_size 4"),
        ({"tp_size": 4, "tp_rank": 2, "ep_size": 2}, "tp_rank 2 of 4 has ep_rank 1 of 2, not 0"),
        ({"ep_size": 2}, "ep_size 2 does not divide tp_size 1"),
    ],
)
def test_parallel_coordinates_must_fit_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**fields)


def test_neighbouring_ranks_share_an_expert():
    ranks = sm.all_ranks(4, 2)
    assert [(rank.ep_rank, rank.moe_tp_rank, rank.moe_tp_size) for rank in ranks] == [
        (0, 0, 2),
        (0, 1, 2),
        (1, 0, 2),
        (1, 1, 2),
    ]
