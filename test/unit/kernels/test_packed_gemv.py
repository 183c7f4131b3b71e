"""The kernel for a single row and words that hold columns, against products with what the numbers stand for."""

import packed_models as pm
import pytest
import torch
import torch.nn.functional as F
from fp8_models import on_device
from packed_models import make_weight
from pairs import pairs
from ramet.srt.layers.quantization.packed import packed_row, takes_packed_row

KINDS = {
    "int4": pm.ct_packed(),
    "int4 by row": pm.ct_packed(group=None),
    "int4 with zeros": pm.ct_packed(has_zeros=True),
    "int8 packed": pm.ct_packed(8),
    "int8": pm.ct_int8(),
    "mxfp4": pm.mxfp4(),
    "nvfp4 of modelopt": pm.nvfp4("modelopt"),
    "nvfp4 of compressed-tensors": pm.nvfp4("compressed-tensors"),
}
OUTPUTS, COLUMNS = 32, 96  # several programs in the interpreter, and the last words of four bits fill no step


def matrix(seed):
    return torch.randn(OUTPUTS, COLUMNS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("kind", "activation", "dtype"),
    pairs(KINDS, ["", "silu"], [torch.float32, torch.bfloat16, torch.float16]),
    ids=str,
)
def test_one_row(device, kind, activation, dtype):
    weight, plain = (on_device(one, device) for one in make_weight(KINDS[kind], [matrix(0)]))
    assert takes_packed_row(weight[0])
    x = torch.randn(1, COLUMNS, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    bias = (torch.arange(OUTPUTS, device=device) / 8).to(dtype)
    actual = packed_row(x, weight[0], bias, activation)
    expected = F.linear(x.float(), plain[0].float(), bias.float())
    if activation:
        gate, up = expected.chunk(2, dim=1)
        expected = F.silu(gate) * up
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("size", [1e-12, 1e8])
@pytest.mark.parametrize("kind", ["int4 with zeros", "int8", "mxfp4"])
def test_small_and_large_numbers(device, kind, size):
    weight, plain = (on_device(one, device) for one in make_weight(KINDS[kind], [matrix(0)]))
    x = torch.randn(1, COLUMNS, generator=torch.Generator().manual_seed(1)).to(device) * size
    expected = x @ plain[0].float().T
    actual = packed_row(x, weight[0], None, "")
    torch.testing.assert_close(actual, expected, atol=2e-5 * size, rtol=2e-5)


def test_what_it_does_not_take():
    weight, _ = make_weight(pm.ct_packed(has_zeros=True, actorder="group"), [matrix(0)])
    assert not takes_packed_row(weight[0])
    weight, _ = make_weight(pm.nvfp4("modelopt"), [matrix(0)], columns=(8, COLUMNS))
    assert not takes_packed_row(weight[0])
