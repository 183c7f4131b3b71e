"""Owns the tests of fp8 checkpoints that are kept as they are: their values and scales, on every rank."""

import re

import fp8_models as fp8
import pytest
import random_models as rm
import sharded_models as sm
import torch
from engine_harness import EngineHarness
from ramet.srt.layers.quantization.dequantize import powers_of_two
from safetensors.torch import load_file, save_file

CUT = (24, 40)  # rows and columns of blocks that no shard of these models ends with
FAMILIES = {
    "llama3": {"vocab_size": 331},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 48},
    "glm4_moe": {},
    "deepseek_v3": {},
    "deepseek_v32": {},  # whose index has a matrix that no format quantises
    "phi3": {},  # q, k and v in one tensor, and so are gate and up
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


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama3", kind) for kind in ("rows", "weights_only", "fbgemm_fp8", "modelopt", "ct_tensor", "ct_blocks")]
    + [("qwen3_moe", kind) for kind in ("tensor", "blocks", "mxfp8")]
    + [("glm4_moe", "blocks"), ("deepseek_v3", "blocks"), ("deepseek_v32", "blocks"), ("phi3", "rows")],
)
def test_values_and_scales_are_the_checkpoints(folders, tmp_path, family, kind):
    """Values times scales are what a plain checkpoint of the products holds, to the last bit."""
    block = (1, 32) if kind == "mxfp8" else CUT
    folder = fp8.write_fp8(folders[family], tmp_path / "fp8", kind, block=block)
    check(folder, fp8.write_plain(folder, tmp_path / "plain", block), *sm.all_ranks(2, 1))


@pytest.mark.parametrize("kind", ["blocks", "ct_blocks", "modelopt"])
def test_scales_of_fused_matrices_are_their_parts(folders, tmp_path, kind):
    folder = fp8.write_fp8(folders["phi3"], tmp_path / "fp8", kind)
    check(folder, fp8.write_plain(folder, tmp_path / "plain"), *sm.all_ranks(1), *sm.all_ranks(2))


def test_a_block_that_reaches_from_one_part_into_the_next_is_refused(folders, tmp_path):
    folder = fp8.write_fp8(folders["phi3"], tmp_path / "fp8", "blocks", block=CUT)
    with pytest.raises(
        ValueError, match=r"gate_up_proj.weight_scale_inv has the scales of .*a block of 24 rows has some"
    ):
        fp8.load_model(folder)


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


@pytest.mark.parametrize("family", ["llama3", "qwen3_moe", "glm4_moe", "deepseek_v3", "deepseek_v32"])
def test_the_engine_answers_as_transformers_over_the_plain_weights(folders, tmp_path, family):
    folder = fp8.write_fp8(folders[family], tmp_path / "fp8", "blocks", block=CUT)
    fp8.check_answers(folder, fp8.write_plain(folder, tmp_path / "plain", CUT))


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
    for family in FAMILIES if kind == "blocks" else ["llama3"]:
        folder = fp8.write_fp8(folders[family], tmp_path / family, kind, is_plain=is_plain, **words)
        check(folder, fp8.write_plain(folder, tmp_path / f"{family}-plain"))
        model = fp8.load_model(folder)
        name = "kv_b_proj" if family.startswith("deepseek") else "qkv_proj"
        assert getattr(model.model.layers["1"].self_attn, name).weight.dtype == torch.bfloat16
        assert getattr(model.model.layers["0"].self_attn, name).weight.dtype == fp8.FP8


def stack_experts(source, target):
    """The same experts as transformers 5 has them in memory: all of a layer in one tensor, gate above up."""
    rm.without_weights(source, target)
    tensors, stacks = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        match = re.fullmatch(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight(.*)", name)
        if match is None:
            tensors[name] = tensor
        else:
            part = "down" if match[3] == "down" else "gate_up"
            stacks.setdefault(f"{match[1]}.{part}_proj{match[4]}", {})[int(match[2]), match[3]] = tensor
    for name, parts in stacks.items():
        rows = [torch.cat([parts[e, p] for p in ("gate", "up", "down") if (e, p) in parts]) for e in range(8)]
        tensors[name] = torch.stack(rows)
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("block", [(16, 16), CUT])
def test_stacked_experts_are_read_where_no_block_has_rows_of_two_matrices(folders, tmp_path, block):
    folder = fp8.write_fp8(folders["qwen3_moe"], tmp_path / "fp8", "blocks", block=block)
    stacked, plain = stack_experts(folder, tmp_path / "stacked"), fp8.write_plain(folder, tmp_path / "plain", block)
    check(stacked, plain, sm.all_ranks(2, 2)[1])
    other = rm.make_model(tmp_path / "other", "qwen3_moe", dtype="bfloat16", num_experts=8, moe_intermediate_size=40)
    across = stack_experts(fp8.write_fp8(other, tmp_path / "across", "blocks", block=(16, 16)), tmp_path / "bad")
    with pytest.raises(ValueError, match=r"a block of 16 rows has some of both"):
        fp8.load_model(across)


def test_dummy_weights_of_an_fp8_model_answer(folders, tmp_path):
    folder = rm.without_weights(fp8.write_fp8(folders["llama3"], tmp_path / "fp8", "blocks"), tmp_path / "config")
    engine = EngineHarness(folder, device="cpu", load_format="dummy")
    result = engine.generate(rm.random_prompts([5]), max_new_tokens=2, return_logprob=True)[0]
    assert len(result.token_ids) == 2 and torch.tensor(result.output_logprobs).isfinite().all()


def test_parts_of_one_matrix_are_of_one_kind(folders, tmp_path):
    folder = fp8.write_fp8(folders["llama3"], tmp_path, "blocks", modules_to_not_convert=["k_proj"])
    with pytest.raises(ValueError, match=r"leaves model.layers.0.self_attn.k_proj.weight as it is and quantises .*q_"):
        fp8.load_model(folder)
