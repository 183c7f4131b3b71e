"""The kernels of products in fp8 with scales of blocks, against those products of dequantised numbers."""

import pytest
import torch
import torch.nn.functional as F
from pairs import pairs

BLOCK = 128
SIZES = {  # rows of each group; the last number belongs to no group
    "one row": [0, 1, 0, 0],
    "some without rows": [5, 0, 17, 0, 33, 3],
    "no rows at all": [0, 0, 0],
}


def make_rows(device, num_rows, num_columns, dtype=torch.float32):
    x = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(num_rows))
    return (x * torch.logspace(-2, 2, num_rows)[:, None]).to(device, dtype) if num_rows else x.to(device, dtype)


def make_weights(device, num_groups, num_outputs, num_columns, row_blocks):
    """Values, scales, and what they stand for in float32."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(num_groups, num_outputs, num_columns, generator=generator).to(torch.float8_e4m3fn)
    num_grid_columns = -(-num_columns // BLOCK)
    scales = torch.rand(num_groups, int(row_blocks[-1]) + 1, num_grid_columns, generator=generator) + 0.1
    each = scales[:, row_blocks].repeat_interleave(BLOCK, 2)[..., :num_columns]
    return values.to(device), scales.to(device), (values.float() * each).to(device)


def dequantised(x, values, scales):
    """What quantised rows stand for, and that they are near what was quantised."""
    rows = values.float() * scales.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
    close = torch.isclose(rows, x.float(), rtol=2**-4 * 1.01, atol=float(x.abs().max()) / 448 / 2)
    # Triton's interpreter halves what it rounds up to a power of two.
    close |= torch.isclose(2 * rows, x.float(), rtol=2**-4) & (not x.is_cuda)
    assert close.all()
    return rows


def check(actual, expected):
    """Row by row: their sizes differ. Hopper's units sum fp8 products with 14 bits or so."""
    errors = (actual.float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.max()) < (3e-3 if actual.is_cuda else 1e-5)


def row_blocks_of(num_outputs, first):
    return (torch.arange(num_outputs, dtype=torch.int32) + first) // BLOCK


def test_quantised_groups(device):
    from ramet.srt.layers.kernels.fp8_blocks import quantize_groups

    x = make_rows(device, 11, 300)
    x[4, 128:256] = 0
    values, scales = quantize_groups(x)
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (11, 3) and scales.stride() == (1, 11)
    dequantised(x, values, scales)
    largest = x[:, :128].abs().amax(1)
    torch.testing.assert_close(scales[:, 0], largest / 448)


def test_quantised_activations(device):
    from ramet.srt.layers.kernels.fp8_blocks import quantize_groups

    x = make_rows(device, 5, 600, torch.float16)
    gate, up = x.float().chunk(2, dim=1)
    expected = (F.silu(gate) * up).half()
    values, scales = quantize_groups(x, "silu")
    again = quantize_groups(expected)
    torch.testing.assert_close(scales, again[1], rtol=2e-3, atol=0)
    dequantised(expected, values, scales)


@pytest.mark.parametrize("num_rows", [1, 13, 40])
@pytest.mark.parametrize(("num_outputs", "num_columns", "first"), [(256, 512, 0), (72, 300, 0), (160, 256, 40)])
def test_product_with_one_matrix(device, num_rows, num_outputs, num_columns, first):
    """Whole blocks and others, rows that begin within a block; columns are split where there are few tiles."""
    from ramet.srt.layers.kernels.fp8_blocks import blocks_linear, quantize_groups

    x = make_rows(device, num_rows, num_columns)
    row_blocks = row_blocks_of(num_outputs, first)
    weight, scales, plain = make_weights(device, 1, num_outputs, num_columns, row_blocks)
    values, x_scales = quantize_groups(x)
    expected = dequantised(x, values, x_scales) @ plain[0].T
    given = row_blocks.to(device) if first else None
    for _ in range(2):  # the counters are zero again
        actual = blocks_linear(values, x_scales, weight, scales, given, BLOCK, None, torch.float32)
        check(actual, expected)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("first", [0, 40])
def test_groups(device, sizes, first):
    from ramet.srt.layers.kernels.fp8_blocks import blocks_linear, quantize_groups

    num_groups, num_outputs, num_columns = len(sizes) - 1, 72, 256
    x = make_rows(device, sum(sizes), num_columns)
    row_blocks = row_blocks_of(num_outputs, first)
    weight, scales, plain = make_weights(device, num_groups, num_outputs, num_columns, row_blocks)
    ends = torch.tensor(sizes[:-1], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    values, x_scales = quantize_groups(x)
    given = row_blocks.to(device) if first else None
    actual, start = blocks_linear(values, x_scales, weight, scales, given, BLOCK, ends, torch.float32), 0
    assert actual.shape == (len(x), num_outputs)
    rows = dequantised(x, values, x_scales) if len(x) else x
    for matrix, end in zip(plain, ends.tolist(), strict=True):
        if start < end:
            check(actual[start:end], rows[start:end] @ matrix.T)
        start = end


@pytest.mark.parametrize(
    ("dtype", "shape", "activation"),
    pairs([torch.float32, torch.bfloat16, torch.float16], [(136, 256, 0), (70, 300, 0), (90, 256, 40)], ["", "silu"]),
    ids=str,
)
def test_single_row(device, dtype, shape, activation):
    """Rows of one block and of two for a program, columns that end within a block."""
    from ramet.srt.layers.kernels.gemv import BlockScales, gemv

    num_rows, num_columns, first = shape
    x = make_rows(device, 1, num_columns).to(dtype)
    row_blocks = row_blocks_of(num_rows, first)
    weight, scales, plain = make_weights(device, 1, num_rows, num_columns, row_blocks)
    bias = torch.arange(num_rows, device=device).to(dtype) / num_rows
    given = row_blocks.to(device) if first else None
    actual = gemv(x, weight[0], bias, BlockScales(scales[0], given, BLOCK), activation)
    expected = F.linear(x.float(), plain[0], bias.float())
    if activation:
        gate, up = expected.chunk(2, dim=1)
        expected = F.silu(gate) * up
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)
