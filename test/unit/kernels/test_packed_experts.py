"""Single rows each with the matrix of a stack that it goes to: packed experts of one and of a few tokens."""

import os
import subprocess
import sys

import compiled_kernels
import packed_models as pm
import pytest
import torch
import torch.nn.functional as F
from fp8_models import on_device
from packed_models import make_weight
from ramet.srt.configs.moe_config import ClampedGate
from ramet.srt.layers import fused_experts, matmul
from ramet.srt.layers.fused_experts import BiasedGate
from ramet.srt.layers.kernels.choices import EXPERTS_BY, OURS, row_class, trying
from ramet.srt.layers.kernels.gemv import Experts, gemv
from ramet.srt.layers.quantization import packed
from ramet.srt.layers.quantization.packed import packed_row_by_experts, takes_packed_experts

KINDS = {"mxfp4": pm.mxfp4(), "int4 with zeros": pm.ct_packed(has_zeros=True), "nvfp4": pm.nvfp4("compressed-tensors"),
         "gptq": pm.gptq()}  # fmt: skip
EXPERTS, OUTPUTS, COLUMNS, TOP_K = 5, 16, 64, 3
# Of three tokens: one expert hit by all, one twice by the same token, some by nobody, and others' on both sides.
IDS = torch.tensor([[2, 4, 9], [2, 0, 0], [-1, 2, 5]], dtype=torch.int32)


def stack(kind, outputs, columns, device):
    generator = torch.Generator().manual_seed(outputs)
    matrices = [torch.randn(outputs, columns, generator=generator) / columns**0.5 for _ in range(EXPERTS)]
    return tuple(on_device(one, device) for one in make_weight(KINDS[kind], matrices))


def rows(number, columns, device):
    return torch.randn(number, columns, generator=torch.Generator().manual_seed(7)).to(device)


def expected_of(x, plain, ids, first_expert):
    """Row by row, zeros for experts that are not here."""
    y = torch.zeros(ids.numel(), plain.shape[1])
    for place, expert in enumerate((ids.flatten() - first_expert).tolist()):
        if 0 <= expert < len(plain):
            y[place] = plain[expert].float().cpu() @ x[place * len(x) // ids.numel()].float().cpu()
    return y


@pytest.mark.parametrize(
    ("kind", "first_expert", "activation"), [*((kind, 0, "silu") for kind in KINDS), ("mxfp4", 1, ""), ("gptq", 1, "")]
)
def test_each_row_has_its_experts_matrix(device, kind, first_expert, activation):
    weight, plain = stack(kind, OUTPUTS, COLUMNS, device)
    assert takes_packed_experts(weight)
    x = rows(len(IDS), COLUMNS, device)
    experts = Experts(IDS.flatten().to(device), first_expert)
    actual = packed_row_by_experts(x, weight, experts, activation)
    expected = expected_of(x, plain, IDS, first_expert)
    if activation:
        gate, up = expected.chunk(2, dim=1)
        expected = F.silu(gate) * up
    torch.testing.assert_close(actual.cpu(), expected, atol=2e-5, rtol=2e-5)


def test_columns_that_are_split_are_added_up_for_each_row(device):
    """GPTQ's, of more columns than a program takes at once."""
    weight, plain = stack("gptq", 32, 512, device)
    x, ids = rows(1, 512, device), IDS[0]
    for _ in range(2):  # the counters are zero again
        actual = packed_row_by_experts(x, weight, Experts(ids.to(device), 0), "")
        torch.testing.assert_close(actual.cpu(), expected_of(x, plain, ids, 0), atol=1e-4, rtol=1e-4)


def test_rows_of_several_tokens_by_plain_matrices(device):
    weight = torch.randn(EXPERTS, OUTPUTS, 200, generator=torch.Generator().manual_seed(0)).to(device)
    x = rows(len(IDS), 200, device)
    actual = gemv(x, weight, experts=Experts(IDS.flatten().to(device), 1))
    torch.testing.assert_close(actual.cpu(), expected_of(x, weight, IDS, 1), atol=1e-4, rtol=1e-4)


@pytest.fixture
def by_kernels(monkeypatch):
    """The layers' choices as on a GPU, computed in the interpreter."""
    for module in (matmul, fused_experts):
        monkeypatch.setattr(module, "use_kernels", lambda x: True)
    monkeypatch.setattr(fused_experts, "needs_host", lambda *args: False)
    monkeypatch.setattr(matmul, "has_fp8_kernel", lambda weight: False)
    calls = []
    original = packed.packed_row_by_experts
    monkeypatch.setattr(matmul, "packed_row_by_experts", lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_clamped_experts_of_few_tokens(device, by_kernels, num_tokens):
    """gpt-oss's, with biases: the whole way of a layer, one token as it is and two where that was measured."""
    w13, plain13 = stack("mxfp4", 2 * 32, COLUMNS, device)
    w2, plain2 = stack("mxfp4", OUTPUTS, 32, device)
    generator = torch.Generator().manual_seed(3)
    w13_bias, w2_bias = (torch.randn(EXPERTS, size, generator=generator).to(device) for size in (64, OUTPUTS))
    gate = BiasedGate(ClampedGate(alpha=1.7, limit=1.0), w13_bias, w2_bias)
    ids, weights = IDS[:num_tokens].to(device), torch.rand(num_tokens, TOP_K, generator=generator).to(device)
    x = rows(num_tokens, COLUMNS, device)
    key13, key2 = ((row_class(ids.numel()), EXPERTS, *weight.shape[1:], 4) for weight in (w13, w2))
    with trying(EXPERTS_BY, key13, OURS), trying(EXPERTS_BY, key2, OURS):
        actual = fused_experts.fused_experts(x, w13, w2, weights, ids, gate, first_expert=1)
    assert by_kernels == [1, 1]
    expected = torch.zeros(num_tokens, OUTPUTS)
    for token in range(num_tokens):
        for share, expert in zip(weights[token].tolist(), (ids[token] - 1).tolist(), strict=True):
            if 0 <= expert < EXPERTS:
                y = (plain13[expert].float() @ x[token] + w13_bias[expert]).cpu()
                first, up = y[0::2].clamp(max=1.0), y[1::2].clamp(-1.0, 1.0)
                hidden = first * torch.sigmoid(1.7 * first) * (up + 1)
                expected[token] += share * (plain2[expert].float().cpu() @ hidden + w2_bias[expert].cpu())
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_what_is_not_taken():
    for kind in (pm.awq(), pm.gptq(desc_act=True)):
        other, _ = make_weight(kind, [torch.randn(OUTPUTS, COLUMNS)])
        assert not takes_packed_experts(other)
    within, _ = make_weight(pm.nvfp4("modelopt"), [torch.randn(OUTPUTS, COLUMNS)], columns=(8, COLUMNS))
    assert not takes_packed_experts(within)


def test_they_compile_for_a_gpu():
    """The interpreter takes what the compiler does not: a variable that changes its type in a loop, for one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, compiled_kernels.__file__]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
