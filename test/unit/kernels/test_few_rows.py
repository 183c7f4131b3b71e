"""The kernel for products of a few rows against torch, and which products it takes."""

import pytest
import torch
from pairs import pairs

FORMS = {  # outputs, columns: as many splits as the 8 multiprocessors that the interpreter has need
    "whole": (512, 512),
    "in two": (256, 1024),
    "in four": (128, 1536),
}


@pytest.fixture
def few_rows(device):
    from ramet.srt.layers.kernels import few_rows

    return few_rows


@pytest.mark.parametrize(("form", "num_rows", "has_bias"), pairs(FORMS, [2, 16, 17, 32], [False, True]))
def test_product(device, few_rows, form, num_rows, has_bias):
    num_outputs, num_columns = FORMS[form]
    torch.manual_seed(0)
    rows = torch.randn(num_rows, num_columns + 64, device=device).half()
    weight = (torch.randn(num_outputs, num_columns, device=device) / num_columns**0.5).half()
    bias = torch.randn(num_outputs, device=device).half() if has_bias else None
    for x in (rows[:, :num_columns].contiguous(), rows[:, 64:]):
        for _ in range(2):  # what one call leaves behind is the next one's start
            out = few_rows.few_rows_linear(x, weight, bias)
            expected = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
            torch.testing.assert_close(out.float(), expected, rtol=5e-3, atol=5e-3)


def test_which_it_takes(few_rows, monkeypatch):
    monkeypatch.setattr(few_rows, "can_launch_early", lambda device: True)

    def takes(num_rows=8, num_outputs=128, num_columns=512, dtype=torch.bfloat16, weight_dtype=torch.bfloat16):
        weight = torch.empty(num_outputs, num_columns, dtype=weight_dtype, device="meta")
        return few_rows.takes(torch.empty(num_rows, num_columns, dtype=dtype, device="meta"), weight)

    assert takes() and takes(num_rows=2) and takes(num_rows=32)
    assert takes(dtype=torch.float16, weight_dtype=torch.float16)
    refused = [{"num_rows": 1}, {"num_rows": 33}, {"num_outputs": 100}, {"num_columns": 640}, {"num_outputs": 1 << 17}]
    refused += [{"dtype": torch.float32, "weight_dtype": torch.float32}, {"weight_dtype": torch.float8_e4m3fn}]
    assert not any(takes(**changed) for changed in refused)
