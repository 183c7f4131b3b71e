"""Products on CPUs with weights as they are stored, against float64 with what their numbers stand for."""

import itertools

import packed_models as pm
import pytest
import torch
from cpu_kernels import cpu_kernels  # noqa: F401
from fp8_models import fp8_weight
from packed_models import make_weight
from ramet.srt.configs.weight_format import fp8_blocks
from ramet.srt.layers.activation import get_activation
from ramet.srt.layers.cpu_kernels import library
from ramet.srt.layers.fused_experts import MOST_ROWS, fused_experts
from ramet.srt.layers.matmul import project
from ramet.srt.layers.quantization.dequantize import dequantize
from ramet.srt.layers.quantization.stored import stored_linear, takes_stored
from ramet.srt.layers.quantization.weight import GridIndex, QuantizedWeight, WeightLayout

KINDS = {
    "int4": pm.ct_packed(),
    "int4 of larger groups": pm.ct_packed(group=64),
    "int4 by row": pm.ct_packed(group=None),
    "int4 with zeros": pm.ct_packed(has_zeros=True),
    "int8 packed": pm.ct_packed(8, has_zeros=True),
    "int8": pm.ct_int8(),
    "gptq": pm.gptq(),
    "gptq of the second version": pm.gptq(version="gptq_v2"),
    "gptq of 8 bits": pm.gptq(8),
    "gptq in any order": pm.gptq(desc_act=True),
    "awq": pm.awq(),
    "awq by row": pm.awq(None),
    "mxfp4": pm.mxfp4(),
    "nvfp4 of modelopt": pm.nvfp4("modelopt"),
    "nvfp4 of compressed-tensors": pm.nvfp4("compressed-tensors"),
}
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}  # of the largest result

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(actual, exact):
    assert (actual.double() - exact).abs().max() <= TOLERANCE[actual.dtype] * exact.abs().max()


def check_rows(weight, plain, num_rows, dtype):
    x, bias = random(num_rows, plain.shape[1], seed=9).to(dtype), random(len(plain), seed=3).to(dtype)
    assert takes_stored(x, weight, bias)
    y = project(x, weight, bias)
    assert y.dtype == dtype
    close(y, x.double() @ plain.double().T + bias.double())


def blocks_weight(num_rows, num_columns, first_row=0, first_column=0, block=128):
    """fp8 with a scale for each block, of a rank whose part begins at that place; and what it stands for."""
    rows, columns = (
        torch.arange(first_row, first_row + num_rows) // block,
        torch.arange(first_column, first_column + num_columns) // block,
    )
    values = (random(num_rows, num_columns) * 100).to(torch.float8_e4m3fn)
    scales = torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1, generator=torch.Generator().manual_seed(1))
    indices = {"values": GridIndex(None, 1, 0), "scales": GridIndex(rows.int(), block, first_column)}
    weight = QuantizedWeight(
        WeightLayout(fp8_blocks(block, block), num_rows, num_columns, indices), {"values": values, "scales": scales}
    )
    return weight, values.float() * scales[rows][:, columns]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format(kind, dtype):
    weight, plain = make_weight(KINDS[kind], [random(272, 592)])
    for num_rows in (1, 2, 16, 40):
        check_rows(weight[0], plain[0], num_rows, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [(0, 56), (56, 112)])
def test_a_rank_that_begins_within_a_group(kind, columns):
    weight, plain = make_weight(KINDS[kind], [random(48, 112)], columns=columns)
    for num_rows in (1, 3):
        check_rows(weight[0], plain[0], num_rows, torch.float32)


@pytest.mark.parametrize("sizes", [(33, 7), (300, 130), (2100, 48)])  # columns and rows
def test_fp8_of_any_size_by_row(sizes):
    weight = fp8_weight(random(*sizes[::-1]))
    for num_rows in (1, 5, 40):
        check_rows(weight, dequantize(weight, torch.float32), num_rows, torch.bfloat16)


@pytest.mark.parametrize("place", [(0, 0), (64, 0), (0, 36), (100, 128)])
def test_fp8_by_block(place):
    weight, plain = blocks_weight(200, 404, *place)
    assert torch.equal(dequantize(weight, torch.float32), plain)
    for num_rows in (1, 5, 40):
        check_rows(weight, plain, num_rows, torch.float32)


def test_all_numbers_of_fp8_and_those_that_are_none():
    """Subnormal ones and both zeros, too; NaN shows in the results of its row alone."""
    bits = torch.arange(256).to(torch.uint8)
    numbers = bits[(bits & 127) != 127].view(torch.float8_e4m3fn)
    weight = fp8_weight(random(8, 256))
    weight.values.fill_(0)
    weight.values[:, :254] = numbers
    for num_rows in (1, 20):
        check_rows(weight, dequantize(weight, torch.float32), num_rows, torch.float32)
        weight.values.view(torch.uint8)[3, 200] = 255
        is_nan = stored_linear(torch.ones(num_rows, 256), weight).isnan()
        assert is_nan[:, 3].all() and is_nan.sum() == num_rows
        weight.values.view(torch.uint8)[3, 200] = 0


@pytest.mark.parametrize("kind", [*KINDS, "fp8", "float32"])
def test_stacks(kind):
    matrices = torch.stack([random(144, 592, seed=seed) for seed in range(4)])
    if kind in KINDS:
        weight, plain = make_weight(KINDS[kind], list(matrices))
    elif kind == "fp8":
        weight = fp8_weight(matrices)
        plain = torch.stack([dequantize(weight[place], torch.float32) for place in range(4)])
    else:
        weight = plain = matrices
    sizes = [1, 0, 17, 3]
    x = random(sum(sizes) + 2, 592, seed=9)
    y = stored_linear(x, weight, ends=torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32))
    for place, (start, end) in enumerate(itertools.pairwise(itertools.accumulate(sizes, initial=0))):
        if start < end:
            close(y[start:end], x[start:end].double() @ plain[place].double().T)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_tokens", [1, 5, MOST_ROWS])
def test_experts_are_what_they_are_without_the_kernels(monkeypatch, dtype, num_tokens):
    w13, w2 = random(4, 64, 48).to(dtype), random(4, 48, 32, seed=1).to(dtype)
    x, weights = random(num_tokens, 48, seed=2).to(dtype), random(num_tokens, 2, seed=3).softmax(-1)
    ids = torch.rand(num_tokens, 6, generator=torch.Generator().manual_seed(4)).argsort(-1)[:, :2]
    arguments = (x, w13, w2, weights, ids, get_activation("silu"))
    y = fused_experts(*arguments, first_expert=1)
    monkeypatch.setattr(library, "_library", None)
    expected = fused_experts(*arguments, first_expert=1)
    assert (y.float() - expected.float()).abs().max() <= 4 * TOLERANCE[dtype] * expected.float().abs().max()


def test_what_the_kernels_leave_to_others():
    x = random(1, 112)
    in_any_order, _ = make_weight(pm.ct_packed(has_zeros=True, actorder="group"), [random(48, 112)])
    assert not takes_stored(x, in_any_order[0])
    cut_words, _ = make_weight(pm.mxfp4(), [random(48, 112)], columns=(36, 112))
    assert not takes_stored(x, cut_words[0])
    weight, plain = make_weight(pm.awq(), [random(48, 112)])
    assert not takes_stored(x.double(), weight[0]) and not takes_stored(x, weight[0], torch.zeros(48).half())
    assert not takes_stored(x, plain[0].T)
