"""Products in fp8 with scales of blocks on a GPU: near the exact ones, whatever computes them, and in a graph."""

import pytest
import torch
from ramet.srt.configs.weight_format import fp8_blocks
from ramet.srt.layers.activation import act_and_mul, get_activation
from ramet.srt.layers.fp8_matmul import QuantizedRows, activate_for, has_fp8_kernel
from ramet.srt.layers.grouped_linear import grouped_linear
from ramet.srt.layers.matmul import project
from ramet.srt.layers.quantization.dequantize import dequantize
from ramet.srt.layers.quantization.weight import GridIndex, QuantizedWeight, WeightLayout

SHAPES = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (2816, 4096), (4096, 1408), (1000, 704)]


def make_weight(num_outputs, num_columns, stack=()):
    torch.manual_seed(num_outputs)
    values = torch.randn(*stack, num_outputs, num_columns, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.rand(*stack, -(-num_outputs // 128), -(-num_columns // 128), device="cuda") / num_columns**0.5 + 1e-3
    rows = torch.arange(num_outputs, dtype=torch.int32, device="cuda") // 128
    indices = {"values": GridIndex(None, 1, 0), "scales": GridIndex(rows, 128, 0, is_regular=True)}
    layout = WeightLayout(fp8_blocks(128, 128, multiplies_fp8=True), num_outputs, num_columns, indices)
    return QuantizedWeight(layout, {"values": values, "scales": scales})


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_rows", [1, 2, 16, 40, 64, 256, 2048])
@pytest.mark.parametrize(("num_outputs", "num_columns"), SHAPES)
def test_product(num_outputs, num_columns, num_rows):
    weight = make_weight(num_outputs, num_columns)
    if not has_fp8_kernel(weight):
        pytest.skip("a GPU without fp8 units")
    x = torch.randn(num_rows, num_columns, device="cuda").bfloat16()
    bias = torch.randn(num_outputs, device="cuda").bfloat16()
    expected = x.double() @ dequantize(weight, torch.float32).double().T + bias.double()
    first = project(x, weight, bias)
    assert error(first, expected) < (5e-3 if num_rows == 1 else 4e-2)  # a row of e4m3 has errors of up to a sixteenth
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [project(x, weight, bias) for _ in range(5)]
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(out, first) for out in outs), "the order of the sums is always the same"


@pytest.mark.parametrize("num_rows", [1, 24, 200])
def test_activations_are_quantised_at_once(num_rows):
    weight = make_weight(4096, 12288)
    if not has_fp8_kernel(weight):
        pytest.skip("a GPU without fp8 units")
    x, silu = torch.randn(num_rows, 2 * 12288, device="cuda").bfloat16(), get_activation("silu")
    rows = activate_for(x, silu, weight)
    assert isinstance(rows, QuantizedRows) == (num_rows > 1)
    expected = act_and_mul(x, silu).double() @ dequantize(weight, torch.float32).double().T
    assert error(project(rows, weight), expected) < 4e-2


@pytest.mark.parametrize("rows", [1, 4, 30, 100])
@pytest.mark.parametrize(("num_outputs", "num_columns"), [(2816, 4096), (4096, 1408), (1408, 4096), (4096, 704)])
def test_groups(num_outputs, num_columns, rows):
    """Experts with about so many rows each; some have none, and rows behind the last belong to none."""
    weight = make_weight(num_outputs, num_columns, (16,))
    counts = torch.arange(16, device="cuda") % 3 * rows
    ends = counts.cumsum(0).int()
    x = torch.randn(int(ends[-1]) + 3, num_columns, device="cuda").bfloat16()
    actual, start = grouped_linear(x, weight, ends), 0
    for expert, end in enumerate(ends.tolist()):
        if start < end:
            expected = x[start:end].double() @ dequantize(weight[expert], torch.float32).double().T
            assert error(actual[start:end], expected) < 4e-2
        start = end
