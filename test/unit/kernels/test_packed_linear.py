"""The kernels for weights of four and eight bits, against products with what the numbers stand for."""

import packed_models as pm
import pytest
import torch
from fp8_models import on_device
from packed_models import make_weight
from ramet.srt.layers import grouped_linear as gl
from ramet.srt.layers.activation import get_activation
from ramet.srt.layers.fused_experts import fused_experts, needs_host
from ramet.srt.layers.matmul import project
from ramet.srt.layers.quantization.packed import fits_packed_kernel, packed_dequantize, packed_linear

KINDS = {
    "int4": pm.ct_packed(),
    "int4 by row": pm.ct_packed(group=None),
    "int4 with zeros": pm.ct_packed(has_zeros=True),
    "int8 packed": pm.ct_packed(8),
    "int8": pm.ct_int8(),
    "gptq": pm.gptq(),
    "gptq of 8 bits": pm.gptq(8),
    "gptq in any order": pm.gptq(desc_act=True),
    "int4 in any order": pm.ct_packed(has_zeros=True, actorder="group"),
    "awq": pm.awq(),
    "mxfp4": pm.mxfp4(),
    "nvfp4 of modelopt": pm.nvfp4("modelopt"),
    "nvfp4 of compressed-tensors": pm.nvfp4("compressed-tensors"),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
OUTPUTS, COLUMNS = 48, 112


def matrix(seed, num_rows=OUTPUTS, num_columns=COLUMNS):
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed))


def check(device, weight, plain, sizes, dtype):
    """Sizes of groups, one for each matrix; the last rows belong to no group, but where one matrix takes all."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies no bfloat16 matrices")
    x = torch.randn(sum(sizes), plain.shape[2], generator=torch.Generator().manual_seed(1)).to(device, dtype)
    ends = torch.tensor(sizes[: len(plain)], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    weight, plain = on_device(weight, device), plain.to(device, dtype).float()
    assert fits_packed_kernel(weight)
    actual, start = packed_linear(x, weight, ends if len(sizes) > 1 else None), 0
    assert actual.shape == (len(x), OUTPUTS) and actual.dtype == dtype
    for one, end in zip(plain, ends.tolist(), strict=True):
        expected = x[start:end].float() @ one.T
        torch.testing.assert_close(actual[start:end].float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        start = end


@pytest.mark.parametrize(
    ("kind", "num_rows"), [(kind, num_rows) for kind in KINDS for num_rows in (1, 3)] + [("gptq", 40), ("mxfp4", 40)]
)
def test_linear(device, kind, num_rows):
    weight, plain = make_weight(KINDS[kind], [matrix(0)])
    check(device, weight, plain, [num_rows], torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_experts(device, kind):
    weight, plain = make_weight(KINDS[kind], [matrix(seed) for seed in range(4)])
    check(device, weight, plain, [5, 0, 17, 1, 2], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int4 with zeros", "awq", "nvfp4 of modelopt"])
@pytest.mark.parametrize("sizes", [[1], [3]])
def test_half_precision(device, kind, dtype, sizes):
    weight, plain = make_weight(KINDS[kind], [matrix(0)])
    check(device, weight, plain, sizes, dtype)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("kind", ["int4 with zeros", "gptq", "gptq in any order", "awq", "mxfp4", "nvfp4 of modelopt"])
def test_a_rank_that_begins_within_a_group(device, kind, num_rows):
    weight, plain = make_weight(KINDS[kind], [matrix(0)], columns=(56, 112))
    check(device, weight, plain, [num_rows], torch.float32)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("kind", ["int8", "gptq in any order", "nvfp4 of modelopt"])
def test_layers_take_the_kernel_on_a_gpu(device, monkeypatch, kind, num_rows):
    """Linear ones and experts; a weight that it does not fit is dequantised."""
    monkeypatch.setattr(gl, "use_kernels", lambda x: True)
    x = torch.randn(num_rows, COLUMNS, generator=torch.Generator().manual_seed(1)).to(device)
    weight, plain = (on_device(one, device) for one in make_weight(KINDS[kind], [matrix(seed) for seed in range(3)]))
    bias = torch.arange(OUTPUTS, device=device).float()
    torch.testing.assert_close(project(x, weight[1], bias), x @ plain[1].T + bias, atol=1e-4, rtol=1e-4)
    down, plain_down = make_weight(KINDS[kind], [matrix(seed, COLUMNS, OUTPUTS // 2) for seed in range(3)])
    down, plain_down = on_device(down, device), plain_down.to(device)
    routing = (torch.ones(num_rows, 2, device=device), torch.tensor([[2, 0]] * num_rows, device=device))
    assert not needs_host(x.dtype, weight, down)
    y = fused_experts(x, weight, down, *routing, get_activation("silu"))
    monkeypatch.undo()
    expected = fused_experts(x, plain, plain_down, *routing, get_activation("silu"))
    torch.testing.assert_close(y, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_written_out_as_it_is_dequantised_on_a_cpu(device, kind):
    weight, plain = make_weight(KINDS[kind], [matrix(0)])
    weight, plain = on_device(weight[0], device), plain.to(device)
    assert torch.equal(packed_dequantize(weight, torch.float32), plain[0])
    assert torch.equal(packed_dequantize(weight, torch.float16), plain[0].half())


def test_what_the_kernel_does_not_take():
    weight, _ = make_weight(pm.mxfp4(), [matrix(0)], columns=(36, 112))
    assert not fits_packed_kernel(weight)
    weight, _ = make_weight(pm.awq(20), [matrix(0)])
    assert not fits_packed_kernel(weight)
