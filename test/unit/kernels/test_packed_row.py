"""The kernels for few rows and words that lie one output after the other, against what the numbers stand for."""

import packed_models as pm
import pytest
import torch
from fp8_models import on_device
from packed_models import make_weight
from ramet.srt.layers import matmul
from ramet.srt.layers.activation import get_activation
from ramet.srt.layers.quantization.packed import packed_row, takes_packed_row

KINDS = {
    "awq": pm.awq(),
    "awq in groups of 32": pm.awq(32),
    "awq by row": pm.awq(None),
    "gptq": pm.gptq(),
    "gptq of the second version": pm.gptq(version="gptq_v2"),
    "gptq by row": pm.gptq(group=None),
    "gptq of 8 bits": pm.gptq(8, group=32),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Outputs and columns: one part of a tile, whole tiles and splits, and ones that are not full.
SHAPES = [(16, 32), (32, 256), (80, 176)]


def check(
    device, kind, shape, dtype=torch.float32, *, columns=None, num_rows=1, has_bias=False, activation="", scale=1.0
):
    generator = torch.Generator().manual_seed(0)
    weight, plain = make_weight(KINDS[kind], [torch.randn(shape, generator=generator)], columns)
    weight, plain = on_device(weight[0], device), plain[0].to(device)
    assert takes_packed_row(weight)
    x = (torch.randn(num_rows, plain.shape[1], generator=generator) * scale).to(device, dtype)
    bias = torch.randn(shape[0], generator=generator).to(device, dtype) if has_bias else None
    expected = torch.nn.functional.linear(x.float(), plain, None if bias is None else bias.float())
    if activation:
        gate, up = expected.chunk(2, dim=1)
        expected = get_activation(activation)(gate) * up
    first = packed_row(x, weight, bias, activation)
    assert first.dtype == dtype
    atol = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(first.float(), expected, atol=atol, rtol=TOLERANCE[dtype])
    assert torch.equal(packed_row(x, weight, bias, activation), first), (
        "what one call leaves behind is the next one's start"
    )


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(kind, (48, 144)) for kind in KINDS] + [(kind, shape) for kind in ("awq", "gptq") for shape in SHAPES],
    ids=str,
)
def test_product(device, kind, shape):
    check(device, kind, shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["awq", "gptq", "gptq of 8 bits"])
def test_half_precision_with_bias(device, kind, dtype):
    check(device, kind, (32, 160), dtype, has_bias=True)


@pytest.mark.parametrize("kind", ["awq", "gptq"])
@pytest.mark.parametrize(("shape", "has_bias"), [((32, 32), False), ((80, 144), True)], ids=str)
def test_gated(device, kind, shape, has_bias):
    check(device, kind, shape, has_bias=has_bias, activation="silu")


@pytest.mark.parametrize("kind", ["awq", "gptq", "gptq of 8 bits"])
def test_a_rank_that_begins_within_a_group(device, kind):
    check(device, kind, (16, 224), columns=(56, 224))


@pytest.mark.parametrize("num_rows", [2, 21])
@pytest.mark.parametrize("kind", ["awq", "awq in groups of 32"])
def test_few_rows(device, kind, num_rows):
    check(device, kind, (80, 176), num_rows=num_rows, has_bias=True)


@pytest.mark.parametrize("scale", [1e-9, 1e6])
@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_very_small_and_very_large_rows(device, kind, scale):
    check(device, kind, (32, 64), scale=scale)


def test_which_it_takes():
    def takes(kind, shape=(32, 64)):
        return takes_packed_row(make_weight(kind, [torch.ones(shape)])[0][0])

    assert takes(pm.awq()) and takes(pm.gptq(8)) and takes(pm.gptq(), (16, 64))
    refused = [pm.gptq(desc_act=True), pm.ct_packed(has_zeros=True, actorder="group"), pm.awq(20)]
    assert not any(takes(kind) for kind in refused)


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_layers_take_it_on_a_gpu(device, monkeypatch, kind):
    """Also for gate and up with their activation, in one launch."""
    monkeypatch.setattr(matmul, "use_kernels", lambda x: True)
    monkeypatch.setattr(matmul, "quantized_linear", None)
    weight, plain = make_weight(KINDS[kind], [torch.randn(32, 64, generator=torch.Generator().manual_seed(0))])
    weight, plain = on_device(weight[0], device), plain[0].to(device)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).to(device)
    bias = torch.arange(32, device=device).float()
    torch.testing.assert_close(matmul.project(x, weight, bias), x @ plain.T + bias, atol=1e-4, rtol=1e-4)
    assert matmul.takes_gemv(x, weight) and not matmul.takes_gemv(x.repeat(2, 1), weight)
    gate, up = (x @ plain.T + bias).chunk(2, dim=1)
    y = matmul.multiply_row(x, weight, bias, "silu")
    torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up, atol=1e-3, rtol=1e-4)
