"""Owns the tests of fp8 weights: quantised while they load, or read from fp8 checkpoints of several kinds."""

import pytest
import random_models as rm
import torch
from engine_harness import EngineHarness
from fp8_models import fp8_weight, load, same, write_dequantised, write_fp8
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.matmul import project
from ramet.srt.layers.quantization.dequantize import BLOCK_ELEMENTS, dequantize
from ramet.srt.layers.quantization.fp8 import FP8, quantize_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama3", dtype="bfloat16")


def test_rows_keep_their_relative_size():
    x = torch.randn(5, 64) * torch.tensor([1e-6, 1.0, 1e4, 0.0, 3.0])[:, None]
    values, scales = quantize_rows(x)
    assert values.dtype == FP8 and scales.shape == (5, 1)
    torch.testing.assert_close(values.float() * scales, x, rtol=0.07, atol=1e-9)
    assert values.float().abs().amax(dim=1).tolist() == [448, 448, 448, 0, 448]


def test_linear_is_near_the_exact_one():
    x, weight, bias = torch.randn(3, 64), torch.randn(48, 64), torch.randn(48)
    y = project(x, fp8_weight(weight), bias)
    exact = torch.nn.functional.linear(x, weight, bias)
    assert (y - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("num_rows", [1, 32])  # a CPU may multiply many rows in its own way
def test_float16_holds_an_outlier_channel(num_rows):
    """Sums of the values before their scale, up to 448 each, would be more than it holds."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(num_rows, 4096, generator=generator), torch.randn(128, 4096, generator=generator) * 0.02
    x[:, 7] = 600
    y = project(x.half(), fp8_weight(weight)).float()
    exact = torch.nn.functional.linear(x, weight)
    assert (y - exact).norm() / exact.norm() < 0.05


def test_rows_are_dequantised_block_by_block_with_one_rounding(monkeypatch):
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", 100)
    matrix = torch.randn(17, 48)
    values, scales = quantize_rows(matrix)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(fp8_weight(matrix), dtype), (values.float() * scales).to(dtype))


def test_every_sharding_holds_the_same_numbers(folder):
    whole = load(folder)
    first, second = (load(folder, ParallelConfig(tp_size=2, tp_rank=rank)) for rank in range(2))
    for name in (name for name in whole if "o_proj" in name or "down_proj" in name):
        if name.endswith("_scale"):
            assert torch.equal(first[name], whole[name]) and torch.equal(second[name], whole[name])
        else:
            assert same(
                torch.cat([first[name].view(torch.uint8), second[name].view(torch.uint8)], dim=1),
                whole[name].view(torch.uint8),
            )
    name = "model.layers.0.mlp.gate_up_proj.weight"
    half = whole[name].shape[0] // 2
    gate = whole[name].view(torch.uint8)[:half]
    assert torch.equal(first[name].view(torch.uint8)[: half // 2], gate[: half // 2])
    assert torch.equal(first[f"{name}_scale"][: half // 2], whole[f"{name}_scale"][: half // 2])


def test_a_checkpoint_with_scales_of_rows_is_taken_as_it_is(folder, tmp_path):
    expected, read = load(folder), load(write_fp8(folder, tmp_path / "fp8", "rows"))
    assert all(same(read[name], tensor) for name, tensor in expected.items())


def test_the_engine_computes_with_the_quantised_weights(folder, tmp_path):
    expected = write_dequantised(folder, tmp_path / "dequantised")
    prompt = rm.random_prompts([40])[0]
    logprobs = [
        EngineHarness(path, quantization=quantization, dtype="float32", device="cpu")
        .generate([prompt], max_new_tokens=1, logprob_start_len=0)[0]
        .input_logprobs.logprobs[1:]
        for path, quantization in ((folder, "fp8"), (expected, None))
    ]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)
