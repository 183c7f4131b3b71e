"""The blocked product for half-precision weights is right, and at least as exact as the library's."""

import threading

import pytest
import torch
import torch.nn.functional as F
from ramet.srt.layers import cpu_matmul


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(12, 33, 7), (16, 64, 300), (256, 33, 129)])  # num_rows, input_size, output_size
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_the_product_in_float64(monkeypatch, dtype, shape, has_bias):
    for name in ("BLOCK_ELEMENTS", "MANY_ROWS_BLOCK_ELEMENTS"):
        monkeypatch.setattr(cpu_matmul, name, 1000)  # several blocks, the last one partly filled
    num_rows, input_size, output_size = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((num_rows, input_size), generator=generator).to(dtype)
    weight = torch.randn((output_size, input_size), generator=generator).to(dtype)
    bias = torch.randn(output_size, generator=generator).to(dtype) if has_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    result = cpu_matmul.blocked_linear(x, weight, bias)
    assert result.dtype == dtype and result.is_contiguous()
    assert torch.equal(result, exact.to(dtype)) or (result.double() - exact).abs().max() <= (
        (F.linear(x, weight, bias).double() - exact).abs().max()
    )


def test_runs_in_and_out_of_inference_mode():
    x, weight = torch.randn((12, 8)).bfloat16(), torch.randn((5, 8)).bfloat16()
    with torch.inference_mode():
        inside = cpu_matmul.blocked_linear(x, weight).clone()
    assert torch.equal(cpu_matmul.blocked_linear(x, weight), inside)


def test_buffers_are_no_larger_than_a_small_weight(monkeypatch):
    monkeypatch.setattr(cpu_matmul, "_buffers", threading.local())
    num_rows, output_size, input_size = 300, 64, 128
    cpu_matmul.blocked_linear(torch.zeros(num_rows, input_size).bfloat16(), torch.zeros(64, 128).bfloat16())
    sizes = {name: buffer.numel() for name, buffer in vars(cpu_matmul._buffers).items()}
    assert sizes == {"products": num_rows * output_size, "widened": output_size * input_size}


@pytest.mark.parametrize("num_rows", [1, 2, 11, 12])
def test_every_number_of_rows_is_multiplied_right(monkeypatch, num_rows):
    monkeypatch.setattr(cpu_matmul, "MIN_VECTOR_ELEMENTS", 100)
    for bias in (None, torch.randn(40).bfloat16()):
        x, weight = torch.randn((num_rows, 30)).bfloat16(), torch.randn((40, 30)).bfloat16()
        exact = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        torch.testing.assert_close(cpu_matmul.widening_linear(x, weight, bias).float(), exact, rtol=0.01, atol=0.05)


def test_is_for_half_precision_alone():
    assert not cpu_matmul.widens_weights(torch.zeros((64, 4)), torch.zeros((4, 4)))


def test_who_multiplies_is_said(monkeypatch):
    for lacks, said in ((True, "multiply all rows"), (False, "this processor's instructions")):
        monkeypatch.setattr(cpu_matmul, "lacks_instructions", lambda dtype, lacks=lacks: lacks)
        assert said in cpu_matmul.describe_products(torch.bfloat16)
        assert "instructions" not in cpu_matmul.describe_products(torch.float32)
