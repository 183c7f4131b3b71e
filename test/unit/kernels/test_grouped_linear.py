"""The kernel of products with one matrix for each group of rows, against those products one by one."""

import pytest
import torch
from ramet.srt.configs.weight_format import fp8_blocks
from ramet.srt.layers.quantization.dequantize import dequantize
from ramet.srt.layers.quantization.fp8 import quantize_rows
from ramet.srt.layers.quantization.weight import GridIndex, QuantizedWeight, WeightLayout

SIZES = {  # rows of each group; the last number belongs to no group
    "one row": [0, 1, 0, 0],
    "some without rows": [5, 0, 17, 0, 33, 3],
    "tiles are filled": [16, 32, 16, 0],
    "no rows in any group": [0, 0, 0, 4],
    "no rows at all": [0, 0, 0],
    "many groups": [1, 2] * 20 + [7],
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make_inputs(device, sizes, num_columns, output_size, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes), num_columns, generator=generator).to(device, dtype)
    weight = torch.randn(len(sizes) - 1, output_size, num_columns, generator=generator) / num_columns**0.5
    ends = torch.tensor(sizes[:-1], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    return x, weight.to(device, dtype), ends


def quantize_stack(weight):
    values, scales = zip(*(quantize_rows(matrix) for matrix in weight), strict=True)
    return torch.stack(values), torch.stack(scales)


def check(x, weight, ends, scales=None):
    """The rows of all groups; what follows them is not looked at."""
    from ramet.srt.layers.kernels.grouped_linear import grouped_linear

    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies no bfloat16 matrices")
    actual = grouped_linear(x, weight, ends, scales)
    assert actual.shape == (len(x), weight.shape[1]) and actual.dtype == x.dtype
    exact = weight.float() if scales is None else weight.float() * scales
    tolerance, start = TOLERANCE[x.dtype], 0
    for matrix, end in zip(exact.float(), ends.tolist(), strict=True):
        expected = x[start:end].float() @ matrix.T
        torch.testing.assert_close(actual[start:end].float(), expected, atol=tolerance, rtol=tolerance)
        start = end


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("num_columns, output_size", [(64, 32), (40, 50)])
def test_groups_of_all_sizes(device, sizes, num_columns, output_size):
    check(*make_inputs(device, sizes, num_columns, output_size, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(device, dtype):
    check(*make_inputs(device, [5, 0, 17, 3, 2], 72, 48, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_weights(device, dtype):
    x, weight, ends = make_inputs(device, [5, 0, 17, 3, 2], 72, 48, dtype)
    values, scales = quantize_stack(weight)
    check(x, values, ends, scales)


@pytest.mark.parametrize(
    ("dtype", "first_column"), [(torch.float32, 5), (torch.bfloat16, 5), (torch.float16, 0)], ids=str
)
def test_scales_of_blocks(device, dtype, first_column):
    """Rows and columns that begin within a block; each weight is rounded once, as where they are dequantised."""
    from ramet.srt.layers.kernels.grouped_linear import grouped_linear

    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies no bfloat16 matrices")
    x, weight, ends = make_inputs(device, [5, 0, 17, 2], 72, 50, dtype)
    values = (weight * 3).to(torch.float8_e4m3fn)
    rows = (torch.arange(50, dtype=torch.int32, device=device) + 7) // 24
    num_blocks = -(-(first_column + 72) // 24)
    grids = torch.rand(3, 3, num_blocks, generator=torch.Generator().manual_seed(1)).to(device) + 0.1
    index = GridIndex(rows, 24, first_column)
    layout = WeightLayout(fp8_blocks(24, 24), 50, 72, {"values": GridIndex(None, 1, 0), "scales": index})
    actual, start = grouped_linear(x, values, ends, grids, index[:3]), 0
    for matrix, grid, end in zip(values, grids, ends.tolist(), strict=True):
        plain = dequantize(QuantizedWeight(layout, {"values": matrix, "scales": grid}), dtype)
        expected = x[start:end].float() @ plain.float().T
        torch.testing.assert_close(actual[start:end].float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        start = end


def test_every_fp8_value_is_exact(device):
    """One row for each byte that is a number, times 1: subnormal numbers and both zeros too."""
    from ramet.srt.layers.kernels.grouped_linear import grouped_linear

    raw = torch.arange(256, dtype=torch.uint8, device=device)
    raw = raw[(raw & 0x7F) != 0x7F]
    weight = torch.zeros(1, len(raw), 16, dtype=torch.uint8, device=device)
    weight[0, :, 3] = raw
    x = torch.zeros(1, 16, device=device)
    x[0, 3] = 1
    ends = torch.ones(1, dtype=torch.int32, device=device)
    scales = torch.ones(1, len(raw), 1, device=device)
    y = grouped_linear(x, weight.view(torch.float8_e4m3fn), ends, scales)
    assert torch.equal(y[0], raw.view(torch.float8_e4m3fn).float())
