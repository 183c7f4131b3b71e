"""Kernels compute the same with a tile that was chosen for the shape, and layers take the way that was."""

from types import SimpleNamespace

import packed_models as pm
import pytest
import torch
import torch.nn.functional as F
from packed_models import make_weight
from ramet.srt.layers import fp8_matmul, grouped_linear, matmul
from ramet.srt.layers.kernels.choices import (
    EXPERTS_BY,
    FEW_ROWS,
    FP8_BLOCKS_BY,
    GEMV,
    GROUPED,
    GROUPED_BY,
    OTHER,
    OURS,
    PACKED_BY,
    trying,
    watching,
)
from ramet.srt.layers.quantization.packed import multiplies_words


def random(device, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def asked(choice, run):
    """What `run` asks of a choice, and what it takes by itself."""
    with watching() as seen:
        run()
    ((key, default),) = ((key, default) for (one, key), default in seen.items() if one is choice)
    return key, default


def test_a_row(device):
    from ramet.srt.layers.kernels.gemv import TILE, gemv

    x, weight = random(device, 1, 200), random(device, 20, 200, seed=1)
    key, default = asked(GEMV, lambda: gemv(x, weight))
    assert key == (0, 20, 200, 4, 0, 1) and default == TILE
    with trying(GEMV, key, (8, 512, 4)):
        torch.testing.assert_close(gemv(x, weight), F.linear(x, weight), atol=1e-4, rtol=1e-4)


def test_more_rows_than_are_few_by_themselves(device):
    from ramet.srt.layers.kernels import few_rows

    x, weight = random(device, 40, 512).half(), random(device, 64, 512, seed=1).half()
    assert not few_rows.takes(x, weight) and few_rows.takes(x[:32], weight)
    with trying(FEW_ROWS, (64, 64, 512), (2, 3)):
        assert few_rows.takes(x, weight)
        actual = few_rows.few_rows_linear(x, weight)
    torch.testing.assert_close(actual.float(), F.linear(x.float(), weight.float()), atol=0.05, rtol=2e-2)
    with trying(FEW_ROWS, (16, 64, 512), few_rows.BY_LIBRARY):
        assert not few_rows.takes(x[:9], weight) and few_rows.takes(x[:20], weight)


def test_groups(device):
    from ramet.srt.layers.kernels.grouped_linear import grouped_linear as by_kernel

    x, weight = random(device, 9, 70).half(), random(device, 3, 33, 70, seed=1).half()
    ends = torch.tensor([4, 4, 9], dtype=torch.int32, device=device)
    expected = by_kernel(x, weight, ends)
    key, _ = asked(GROUPED, lambda: by_kernel(x, weight, ends))
    assert key == (16, 3, 33, 70, 2)
    with trying(GROUPED, key, (32, 64, 64, 4, 3)):
        torch.testing.assert_close(by_kernel(x, weight, ends), expected)


@pytest.mark.parametrize("rows", [64, 96, 200])
def test_products_of_blocks(rows):
    weight = SimpleNamespace(shape=(256, 512))
    is_torch = fp8_matmul._torch_is_faster(rows, weight)
    assert is_torch == (rows >= 96)
    key, _ = asked(FP8_BLOCKS_BY, lambda: fp8_matmul._torch_is_faster(rows, weight))
    with trying(FP8_BLOCKS_BY, key, OURS if is_torch else OTHER):
        assert fp8_matmul._torch_is_faster(rows, weight) != is_torch


def test_products_of_groups(monkeypatch):
    weight = torch.empty(4, 32, 16)
    assert grouped_linear._torch_is_faster(100, weight)
    monkeypatch.setattr(grouped_linear, "use_kernels", lambda x: True)
    with trying(GROUPED_BY, (128, 4, 32, 16, 4), OURS):
        assert not grouped_linear._torch_is_faster(100, weight)
        assert grouped_linear._torch_is_faster(129, weight)


def test_words_or_a_matrix():
    """By themselves up to 16 rows of GPTQ's and one of others; a row always, and more than 128 never."""
    gptq, other = (make_weight(kind, [torch.randn(32, 64)])[0][0] for kind in (pm.gptq(), pm.mxfp4()))
    rows = (1, 2, 16, 17, 128, 129)
    assert [multiplies_words(number, gptq) for number in rows] == [True, True, True, False, False, False]
    assert [multiplies_words(number, other) for number in rows] == [True] + [False] * 5
    with trying(PACKED_BY, (128, 32, 64, 4), OURS), trying(PACKED_BY, (2, 32, 64, 4), OTHER):
        assert [multiplies_words(number, gptq) for number in rows] == [True, False, True, False, True, False]


def test_experts_one_by_one(monkeypatch):
    monkeypatch.setattr(matmul, "use_kernels", lambda x: True)
    x, weight = torch.empty(4, 16), torch.empty(8, 32, 16)
    assert matmul.takes_experts_gemv(x[:1], weight, 2) and not matmul.takes_experts_gemv(x, weight, 8)
    with trying(EXPERTS_BY, (8, 8, 32, 16, 32), OURS), trying(EXPERTS_BY, (2, 8, 32, 16, 32), OTHER):
        assert matmul.takes_experts_gemv(x, weight, 8) and not matmul.takes_experts_gemv(x[:1], weight, 2)
    assert not matmul.takes_experts_gemv(x, weight, 257) and not matmul.takes_experts_gemv(x[:0], weight, 0)
