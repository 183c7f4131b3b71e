"""Owns the tests of fp8 checkpoints that are kept as they are: their values and scales, on every rank."""

import fp8_models as fp8
import pytest
import random_models as rm
import sharded_models as sm
import torch
from engine_harness import EngineHarness
from ramet.srt.model_loader.checkpoint.quantizing_reader import powers_of_two

CUT = (24, 40)  # rows and columns of blocks that no shard of these models ends with
FAMILIES = {
    "llama3": {"vocab_size": 331},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 48},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: rm.make_model(root / name, name, dtype="bfloat16", **FAMILIES[name]) for name in FAMILIES}


def check(folder, plain, *ranks):
    for parallel in ranks or sm.all_ranks(1):
        expected, actual = (fp8.effective(fp8.load_model(path, parallel)) for path in (plain, folder))
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, actual[name]), (parallel, name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["rows", "tensor", "weights_only", "modelopt", "blocks", "ct_blocks"])
def test_values_and_scales_are_the_checkpoints(folders, tmp_path, family, kind):
    """Values times scales are what a plain checkpoint of the products holds, to the last bit."""
    folder = fp8.write_fp8(folders[family], tmp_path / "fp8", kind, block=CUT)
    check(folder, fp8.write_plain(folder, tmp_path / "plain", CUT))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_of_other_types_are_decoded(folders, tmp_path, scale_dtype):
    names = {"scale_fmt": "ue8m0"} if scale_dtype == torch.float8_e8m0fnu else {}
    folder = fp8.write_fp8(folders["llama3"], tmp_path / "fp8", "blocks", scale_dtype=scale_dtype, **names)
    check(folder, fp8.write_plain(folder, tmp_path / "plain"))


def test_exponents_are_decoded_exactly():
    raw = torch.arange(256, dtype=torch.uint8)
    expected = raw.view(torch.float8_e8m0fnu).float()
    assert torch.equal(powers_of_two(raw)[:255], expected[:255]) and powers_of_two(raw)[255].isnan()
    assert powers_of_two(raw)[127] == 1.0


@pytest.mark.parametrize(("family", "topology"), [("llama3", (4, 1)), ("qwen3_moe", (4, 2))])
def test_ranks_that_cut_blocks_compute_with_the_same_numbers(folders, tmp_path, family, topology):
    """Rows and columns of every rank begin within a block of some matrix."""
    folder = fp8.write_fp8(folders[family], tmp_path / "fp8", "blocks", block=CUT)
    check(folder, fp8.write_plain(folder, tmp_path / "plain", CUT), *sm.all_ranks(*topology))


def logprobs(folder, prompts):
    engine = EngineHarness(folder, device="cpu", dtype="float32")
    results = engine.generate(prompts, max_new_tokens=4, logprob_start_len=0)
    return [(result.token_ids, result.input_logprobs.logprobs[1:]) for result in results]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_answers_as_over_the_plain_weights(folders, tmp_path, family):
    folder = fp8.write_fp8(folders[family], tmp_path / "fp8", "blocks", block=CUT)
    prompts = rm.random_prompts([5, 40])
    assert logprobs(folder, prompts) == logprobs(fp8.write_plain(folder, tmp_path / "plain", CUT), prompts)


def is_plain(name):
    return "layers.1." in name or "o_proj" in name


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("blocks", {"modules_to_not_convert": ["model.layers.1", "o_proj"]}),
        ("rows", {"ignore": ["re:model.layers.1.*", "re:.*o_proj$", "lm_head"]}),
        ("modelopt", {"exclude_modules": ["model.layers.1", "*o_proj"]}),
    ],
)
def test_layers_that_are_left_out_keep_their_type(folders, tmp_path, kind, words):
    for family in FAMILIES:
        folder = fp8.write_fp8(folders[family], tmp_path / family, kind, is_plain=is_plain, **words)
        check(folder, fp8.write_plain(folder, tmp_path / f"{family}-plain"))
        model = fp8.load_model(folder)
        assert model.model.layers["1"].self_attn.qkv_proj.weight.dtype == torch.bfloat16
        assert model.model.layers["0"].self_attn.qkv_proj.weight.dtype == fp8.FP8


def test_parts_of_one_matrix_are_of_one_kind(folders, tmp_path):
    folder = fp8.write_fp8(folders["llama3"], tmp_path, "blocks", modules_to_not_convert=["k_proj"])
    with pytest.raises(ValueError, match=r"leaves model.layers.0.self_attn.k_proj.weight as it is and quantises .*q_"):
        fp8.load_model(folder)
