"""Owns the tests of experts with fp8 weights: as they load, over topologies, and what the engine makes of them."""

import json

import pytest
import random_models as rm
import sharded_models as sm
import torch
from engine_harness import EngineHarness
from fp8_models import FP8, load, same, write_dequantised, write_fp8
from ramet.srt.layers.quantization.fp8 import quantize_rows
from safetensors.torch import load_file

FAMILIES = {"qwen3_moe": {"moe_intermediate_size": 48}, "mixtral": {"intermediate_size": 80}}
PROMPTS = rm.random_prompts([40] * 3)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return rm.make_model(path, request.param, dtype="bfloat16", **FAMILIES[request.param])


def by_checkpoint_name(parameters):
    """(checkpoint tensor, slice of it) -> what a rank holds of it, for all that belongs to experts."""
    held = {}
    for parameter in parameters.values():
        for box in parameter.boxes:
            if ".experts." in box.checkpoint_name:
                part = parameter[tuple(slice(*extent) for extent in box.target)]
                shape = [stop - start for start, stop in box.source]
                held[box.checkpoint_name, box.source] = part.reshape(shape)
    return held


def whole_experts(parameters):
    return {name: tensor for (name, _), tensor in by_checkpoint_name(parameters).items()}


def test_experts_are_quantised_by_row(folder):
    experts = whole_experts(load(folder))
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if ".experts." in name]
    assert len(experts) == 2 * len(names) > 0
    for name in names:
        values, scales = quantize_rows(tensors[name])
        assert experts[name].dtype == FP8 and same(experts[name].contiguous(), values)
        assert torch.equal(experts[f"{name}_scale"], scales)
        assert ((values.float() * scales - tensors[name].float()).norm() / tensors[name].float().norm()) < 0.04


@pytest.mark.parametrize("topology", [(2, 1), (2, 2), (4, 2)], ids=sm.topology_name)
def test_every_topology_holds_the_same_numbers(folder, topology):
    """A rank's columns of a down projection have the scale of the whole row: it is not the one they would get alone."""
    whole = whole_experts(load(folder))
    num_held = dict.fromkeys(whole, 0)
    for parallel in sm.all_ranks(*topology):
        for (name, source), part in by_checkpoint_name(load(folder, parallel)).items():
            expected = whole[name][tuple(slice(*extent) for extent in source)]
            assert same(part.contiguous(), expected.contiguous()), name
            num_held[name] += part.numel()
    moe_tp_size = topology[0] // topology[1]
    for name, count in num_held.items():
        is_shared = name.endswith(("down_proj.weight_scale", "w2.weight_scale"))
        assert count == whole[name].numel() * (moe_tp_size if is_shared else 1), name


def test_a_checkpoint_with_scales_of_rows_is_taken_as_it_is(folder, tmp_path):
    expected, read = load(folder), load(write_fp8(folder, tmp_path / "fp8", "rows"))
    assert all(same(read[name], tensor) for name, tensor in expected.items())


def test_experts_that_are_stacked_in_the_checkpoint_are_quantised_too(folder, tmp_path):
    family = json.loads((folder / "config.json").read_text())["model_type"]
    stacked = rm.make_model(tmp_path, family, dtype="bfloat16", stacked_experts=True, **FAMILIES[family])
    assert any(name.endswith("experts.down_proj") for name in load_file(stacked / "model.safetensors"))
    expected, read = load(folder), load(stacked)
    assert all(same(read[name], tensor) for name, tensor in expected.items())


def logprobs(folder, dtype="float32", **flags):
    """Of all prompts' tokens, each given those before it."""
    engine = EngineHarness(folder, device="cpu", dtype=dtype, **flags)
    results = engine.generate(PROMPTS, max_new_tokens=1, logprob_start_len=0)
    return torch.tensor([value for result in results for value in result.input_logprobs.logprobs[1:]])


def test_the_engine_computes_with_the_quantised_weights(folder, tmp_path):
    dequantised = write_dequantised(folder, tmp_path / "dequantised")
    torch.testing.assert_close(logprobs(folder, quantization="fp8"), logprobs(dequantised), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_quantised_model_follows_the_exact_one(folder, dtype):
    """Such random models enlarge every error: a dense one of these differs by 0.23; unrelated numbers by 1.4."""
    exact = logprobs(folder)
    difference = logprobs(folder, dtype, quantization="fp8") - exact
    assert difference.norm() / (exact - exact.mean()).norm() < 0.6
