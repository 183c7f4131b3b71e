"""The kernels around the experts' products, against the layers' own torch code."""

import math

import pytest
import torch
from ramet.srt.configs.model_family import ExpertTraits
from ramet.srt.configs.moe_config import ClampedGate, MoeConfig
from ramet.srt.layers.activation import clamped_gate
from ramet.srt.layers.fused_experts import SharedOutput
from ramet.srt.layers.moe import TopKRouter

SOFTMAX = ExpertTraits()
SIGMOID = ExpertTraits(scoring="sigmoid")
BIASED = ExpertTraits(scoring="sigmoid", correction_bias="bias")
# By what they are like: experts, top k, and what else differs from the plainest router.
ROUTERS = {
    "softmax": (128, 8, {}),
    "normalised": (128, 8, {"norm_topk_prob": True}),
    "few": (8, 2, {"norm_topk_prob": True}),
    "all of one": (1, 1, {}),
    "odd numbers": (60, 5, {"scaling_factor": 2.5}),
    "many": (512, 32, {"norm_topk_prob": True}),
    "all chosen": (20, 20, {}),
    "sigmoid": (72, 6, {"traits": SIGMOID, "norm_topk_prob": True, "scaling_factor": 1.5}),
    "bias": (160, 8, {"traits": BIASED, "norm_topk_prob": True}),
    "softmax with a bias": (24, 3, {"traits": ExpertTraits(correction_bias="bias")}),
    "groups": (256, 8, {"traits": BIASED, "num_groups": 8, "num_kept_groups": 4, "norm_topk_prob": True}),
    "odd groups": (45, 7, {"traits": BIASED, "num_groups": 5, "num_kept_groups": 3, "scaling_factor": 0.5}),
    "groups without a bias": (12, 4, {"num_groups": 6, "num_kept_groups": 2}),
}


def make_router(num_experts, top_k, others):
    """Whose logits are its inputs."""
    moe = MoeConfig(
        **{"norm_topk_prob": False}
        | {"num_experts": num_experts, "num_experts_per_tok": top_k, "intermediate_size": 1, "sparse_layers": (True,)}
        | others
    )
    router = TopKRouter(num_experts, moe, "mlp", dtype=torch.float32)
    router.weight = torch.nn.Parameter(torch.eye(num_experts), requires_grad=False)
    if moe.traits.correction_bias:
        bias = torch.randn(num_experts, generator=torch.Generator().manual_seed(2)) / 2
        router.e_score_correction_bias = torch.nn.Parameter(bias, requires_grad=False)
    return router


def route(router, logits, device):
    from ramet.srt.layers.kernels.router import route

    bias = router.e_score_correction_bias
    weights, ids = route(logits.to(device), None if bias is None else bias.to(device), router.moe)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    return weights.cpu(), ids.cpu()


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_routing_equals_the_layers(device, router, dtype):
    router = make_router(*router)
    num_experts, top_k = router.moe.num_experts, router.moe.num_experts_per_tok
    # No two of a row are equal in either type: which one torch takes is not defined.
    steps = torch.stack([torch.randperm(num_experts, generator=torch.Generator().manual_seed(n)) for n in range(3)])
    logits = ((steps - num_experts // 2) * (8 / max(64, num_experts))).to(dtype)
    weights, ids = route(router, logits, device)
    expected_weights, expected_ids = router(logits.float())
    assert ids.shape == (3, top_k) and torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=1e-5)


def test_logits_in_bfloat16(device):
    router = make_router(128, 8, {})
    logits = (torch.randperm(128, generator=torch.Generator().manual_seed(1))[None] / 16).bfloat16()
    weights, ids = route(router, logits, device)
    expected_weights, expected_ids = router(logits.float())
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "num_kept_groups": 2}], ids=["plain", "groups"])
def test_of_equal_experts_the_first_are_chosen(device, groups):
    router = make_router(16, 3, {"traits": SIGMOID, **groups})
    logits = torch.zeros(3, 16)
    logits[1, 1::2] = -0.0  # is no less
    logits[2, [5, 6, 9]] = 1
    _, ids = route(router, logits, device)
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2], [5, 6, 9]]


@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "num_kept_groups": 2}], ids=["plain", "groups"])
def test_numbers_that_are_none_choose_experts_that_exist(device, groups):
    """A token's broken values are its own: what it reads and writes lies where it should."""
    router = make_router(20, 4, groups)
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    logits[0], logits[2, 4] = math.nan, math.inf
    weights, ids = route(router, logits, device)
    assert all(len(set(row)) == 4 and set(row) <= set(range(20)) for row in ids.tolist())
    expected_weights, expected_ids = router(logits[1:2])
    assert torch.equal(ids[1:2].long(), expected_ids)
    torch.testing.assert_close(weights[1:2], expected_weights)


def test_no_tokens(device):
    weights, ids = route(make_router(8, 2, {}), torch.empty(0, 8), device)
    assert weights.shape == ids.shape == (0, 2)


# (tokens, top k, experts of this rank, its first expert, experts of all ranks, row size); up to FEW are few.
FEW, FEW_ASSIGNMENTS = 8, 32
LAYOUTS = {
    "one token": (1, 8, 128, 0, 128, 20),
    "one token, another rank's experts": (1, 3, 4, 4, 12, 20),
    "fewer assignments than experts": (3, 2, 16, 0, 16, 33),
    "two blocks of columns": (5, 2, 4, 0, 4, 70),
    "ranks": (7, 3, 5, 5, 15, 17),
    "last rank": (8, 2, 3, 9, 12, 5),
    "as many as one launch takes": (8, 4, 4, 0, 4, 3),
    "few tokens, many assignments": (7, 5, 5, 0, 6, 3),
    "two launches": (9, 3, 6, 0, 6, 40),
    "two launches, ranks": (20, 8, 5, 5, 15, 100),
    "many assignments": (50, 5, 7, 0, 8, 4),
    "one expert": (33, 1, 1, 0, 1, 8),
    "nothing for this rank": (15, 2, 4, 90, 8, 8),
    "few, nothing for this rank": (6, 2, 4, 90, 8, 8),
}


@pytest.fixture
def few(monkeypatch):
    """The same ways with less to compute."""
    from ramet.srt.layers.kernels import expert_rows

    for name, value in {
        "FEW_TOKENS": FEW,
        "FEW_ASSIGNMENTS": FEW_ASSIGNMENTS,
        "BLOCK_ASSIGNMENTS": 32,
        "BLOCK_COLUMNS": 64,
    }.items():
        monkeypatch.setattr(expert_rows, name, value)


def make_layout(device, layout, dtype=torch.float32, ids_dtype=torch.int32):
    """x, ids, and the arguments that follow."""
    num_tokens, top_k, num_experts, first_expert, num_all, size = layout
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.stack([torch.randperm(max(num_all, top_k), generator=generator)[:top_k] for _ in range(num_tokens)])
    x = torch.randn(num_tokens, size, generator=generator).to(device, dtype)
    return x, ids.to(device, ids_dtype), num_experts, first_expert


def expected_layout(ids, num_experts, first_expert):
    """(order, ends, how many are of an expert here) by a stable sort."""
    keys = ids.cpu().flatten().long() - first_expert
    keys = keys.where((keys >= 0) & (keys < num_experts), num_experts)
    order = keys.sort(stable=True).indices
    ends = torch.tensor([int((keys <= expert).sum()) for expert in range(num_experts)])
    return order, ends, int(ends[-1])


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_rows_are_laid_out_as_a_stable_sort_does(device, layout, ids_dtype):
    from ramet.srt.layers.kernels.expert_rows import lay_out_rows

    x, ids, *here = make_layout(device, layout, ids_dtype=ids_dtype)
    rows, places, ends = lay_out_rows(x, ids, *here)
    order, expected_ends, stop = expected_layout(ids, *here)
    assert (places.dtype, ends.dtype, places.shape) == (torch.int32, torch.int32, ids.shape)
    assert torch.equal(ends.cpu().long(), expected_ends)
    assert torch.equal(places.cpu().flatten().long()[order], torch.arange(len(order)))
    assert rows.shape == (ids.numel(), x.shape[1])
    assert torch.equal(rows[:stop].cpu(), x.cpu()[order[:stop] // ids.shape[1]])


@pytest.mark.usefixtures("few")
def test_all_tokens_for_one_expert(device):
    from ramet.srt.layers.kernels.expert_rows import lay_out_rows

    for num_tokens in (8, 150):
        x = torch.randn(num_tokens, 4, device=device)
        ids = torch.full((num_tokens, 1), 2, dtype=torch.int32, device=device)
        rows, places, ends = lay_out_rows(x, ids, 4)
        assert torch.equal(rows, x) and ends.tolist() == [0, 0, num_tokens, num_tokens]
        assert torch.equal(places.flatten().cpu().long(), torch.arange(num_tokens))


@pytest.mark.parametrize("num_tokens", [3, 129])
def test_the_sizes_that_are_run(device, num_tokens):
    from ramet.srt.layers.kernels.expert_rows import lay_out_rows

    x, ids, *here = make_layout(device, (num_tokens, 3, 6, 3, 12, 4))
    rows, places, ends = lay_out_rows(x, ids, *here)
    order, expected_ends, stop = expected_layout(ids, *here)
    assert torch.equal(ends.cpu().long(), expected_ends)
    assert torch.equal(places.cpu().flatten().long()[order], torch.arange(len(order)))
    assert torch.equal(rows[:stop].cpu(), x.cpu()[order[:stop] // 3])


@pytest.mark.usefixtures("few")
def test_rows_that_lie_apart(device):
    from ramet.srt.layers.kernels.expert_rows import lay_out_rows

    for num_tokens in (6, 14):
        wide, ids, *here = make_layout(device, (num_tokens, 2, 4, 0, 4, 40))
        rows, *_ = lay_out_rows(wide[:, 8:24], ids, *here)
        order, *_ = expected_layout(ids, *here)
        assert torch.equal(rows.cpu(), wide[:, 8:24].cpu()[order // 2])


def sum_by_torch(y, places, stop, weights, shared):
    """As the layer does without kernels."""
    y = y.clone()
    y[stop:] = 0
    total = torch.zeros(len(places), y.shape[1])
    for choice in range(places.shape[1]):
        total.addcmul_(y[places[:, choice].long()], weights[:, choice, None])
    total = total.to(y.dtype)
    return total if shared is None else shared.add_to(total)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("layout", "has", "dtype"),
    [(name, "gate", torch.float32) for name in LAYOUTS]
    + [(name, has, torch.float16) for name in ("ranks", "two launches") for has in ("experts alone", "shared", "gate")],
)
def test_sums_equal_the_layers(device, layout, has, dtype):
    from ramet.srt.layers.kernels.expert_rows import combine_rows, lay_out_rows

    x, ids, *here = make_layout(device, LAYOUTS[layout], dtype)
    rows, places, ends = lay_out_rows(x, ids, *here)
    stop = int(ends[-1])
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(rows.shape, generator=generator).to(device, dtype)
    y[stop:] = math.nan
    weights = torch.rand(ids.shape, generator=generator).to(device)
    shared = gate = None
    if has != "experts alone":
        shared = torch.randn(x.shape[0], x.shape[1] + 8, generator=generator).to(device, dtype)[:, 8:]
    if has == "gate":
        gate = torch.randn(len(x), 1, generator=generator).to(device, dtype)
    actual = combine_rows(y, places, ends, weights, shared, gate).cpu()
    plain = None if shared is None else SharedOutput(shared.cpu(), None if gate is None else gate.cpu())
    expected = sum_by_torch(y.cpu(), places.cpu(), stop, weights.cpu(), plain)
    assert actual.dtype == dtype and actual.shape == x.shape
    # The layer rounds before the shared expert's output is added, and that output once more.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-11 if has == "experts alone" else 2**-9
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_the_order_of_the_sum_is_the_choices(device):
    """A sum that loses what is small shows it; whoever adds the other way round gets 1."""
    from ramet.srt.layers.kernels.expert_rows import combine_rows

    y = torch.tensor([[1.0], [-(2.0**30)], [2.0**30]], device=device)  # of experts 0, 1 and 2
    ends = torch.tensor([1, 2, 3], dtype=torch.int32, device=device)
    ones = torch.ones(2, 3, device=device)
    for places, expected in (([0, 2, 1], 0.0), ([2, 1, 0], 1.0)):
        places = torch.tensor([places, places], dtype=torch.int32, device=device)
        assert combine_rows(y, places, ends, ones).tolist() == [[expected]] * 2


@pytest.mark.parametrize("kind", ["plain", "rows", "blocks", "grid rows"])
@pytest.mark.parametrize("activation", ["", "silu"])
def test_one_token_by_its_experts_own_matrices(device, kind, activation):
    """With a row for all experts and with one for each; those of other ranks give zeros.

    Rows are of several programs and blocks, and the last program has fewer where they need not share a block.
    """
    from ramet.srt.layers.kernels.gemv import BlockScales, Experts, gemv

    generator = torch.Generator().manual_seed(3)
    block_rows = 8
    num_experts, num_rows, num_columns, first = 4, 24 if kind == "blocks" else 22, 300, 10
    weight = torch.randn(num_experts, num_rows, num_columns, generator=generator)
    scales, plain = None, weight
    if kind != "plain":
        weight = weight.to(torch.float8_e4m3fn)
    if kind == "rows":
        scales = torch.rand(num_experts, num_rows, 1, generator=generator) + 0.1
        plain = weight.float() * scales
    if kind in ("blocks", "grid rows"):
        grid_rows = (torch.arange(num_rows, dtype=torch.int32) + (3 if kind == "grid rows" else 0)) // block_rows
        grid = torch.rand(num_experts, int(grid_rows[-1]) + 1, 3, generator=generator) + 0.1
        plain = weight.float() * grid[:, grid_rows].repeat_interleave(128, 2)[..., :num_columns]
        scales = BlockScales(grid.to(device), grid_rows.to(device) if kind == "grid rows" else None, block_rows)
    elif scales is not None:
        scales = scales.to(device)
    ids = torch.tensor([13, 9, 10, 14, 11], dtype=torch.int32)
    for x in (torch.randn(1, num_columns, generator=generator), torch.randn(5, num_columns, generator=generator)):
        experts = Experts(ids.to(device), first)
        actual = gemv(x.to(device), weight.to(device), None, scales, activation, experts=experts).cpu()
        for place, expert in enumerate((ids - first).tolist()):
            row = x[min(place, len(x) - 1)]
            expected = plain[expert] @ row if 0 <= expert < num_experts else torch.zeros(num_rows)
            if activation:
                gate, up = expected.chunk(2)
                expected = torch.nn.functional.silu(gate) * up
            torch.testing.assert_close(actual[place], expected, atol=1e-4, rtol=1e-4)


def test_a_sum_in_the_assignments_own_order(device):
    from ramet.srt.layers.kernels.expert_rows import combine_rows

    generator = torch.Generator().manual_seed(4)
    y, weights = torch.randn(3, 300, generator=generator), torch.rand(1, 3, generator=generator)
    shared = torch.randn(1, 300, generator=generator)
    actual = combine_rows(y.to(device), None, None, weights.to(device), shared.to(device)).cpu()
    torch.testing.assert_close(actual, weights @ y + shared)


@pytest.mark.parametrize("size", [5, 1100])
def test_clamped_gate_of_rows_by_expert(device, size):
    """Biases of the row's own expert; some have no rows, and behind the last row of an expert nothing counts."""
    from ramet.srt.layers.kernels import activation

    clamp = ClampedGate(1.702, 1.5)
    ends = torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32)
    y, bias = 2 * torch.randn(7, 2 * size, device=device), torch.randn(5, 2 * size, device=device)
    out = activation.clamped_gate(y, bias, ends.to(device), clamp)
    expected = clamped_gate(y[:5] + bias[[1, 1, 3, 3, 3]], clamp)
    torch.testing.assert_close(out[:5], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first_expert", [0, 2])
def test_biases_behind_the_products_are_weighted(device, first_expert):
    """Of experts here alone: a rank with experts 2 to 4 leaves the others' to others."""
    from ramet.srt.layers.kernels.expert_rows import OutputBias, combine_rows, lay_out_rows

    ids = torch.tensor([[0, 3], [4, 2], [1, 0], [2, 3]], dtype=torch.int32, device=device)
    weights, values = torch.rand(4, 2, device=device), torch.randn(3, 1030, device=device)
    rows, places, ends = lay_out_rows(torch.randn(4, 1030, device=device), ids, 3, first_expert)
    out = combine_rows(rows, places, ends, weights, bias=OutputBias(values, ids, first_expert))
    expected = combine_rows(rows, places, ends, weights)
    for token, choice in ((token, choice) for token in range(4) for choice in range(2)):
        expert = int(ids[token, choice]) - first_expert
        if 0 <= expert < 3:
            expected[token] += weights[token, choice] * values[expert]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
