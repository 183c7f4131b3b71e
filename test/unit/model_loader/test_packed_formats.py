"""Owns the tests of checkpoints of integers and four-bit floats: what ranks hold, and what the engine answers."""

import fp8_models as fp8
import packed_models as pm
import pytest
import random_models as rm
import sharded_models as sm
import torch
from engine_harness import EngineHarness
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.quantization_readers import read_quantization
from ramet.srt.configs.weight_format import mxfp4
from ramet.srt.layers.parameter import declare_weight
from ramet.srt.layers.quantization.declare import declare_quantised
from ramet.srt.layers.quantization.dequantize import dequantize
from ramet.srt.layers.quantization.weight import GridIndex, QuantizedWeight, WeightLayout, weight_of
from ramet.srt.model_loader.checkpoint.digest_store import compute_table
from ramet.srt.model_loader.client.band_check import check_bands
from ramet.srt.weights.manifest import WeightBox, build_weight_manifest
from ramet.srt.weights.planner import ArenaSource, plan
from safetensors.torch import load_file, save_file

FAMILIES = {  # a rank's columns of down projections end within a group
    "llama3": {"vocab_size": 331},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 48},
    "phi3": {"rope_scaling": None},  # q, k and v in one tensor, and so are gate and up
}
KINDS = {
    "int4": pm.ct_packed(),
    "int4 by row": pm.ct_packed(group=None),
    "int4 with zeros": pm.ct_packed(has_zeros=True),
    "int4 with zeros in any order": pm.ct_packed(has_zeros=True, actorder="group"),
    "int8 packed": pm.ct_packed(8, has_zeros=True, actorder="weight"),
    "int8": pm.ct_int8(),
    "int8 by matrix": pm.ct_int8("tensor"),
    "gptq": pm.gptq(),
    "gptq by row": pm.gptq(group=None),
    "gptq of 8 bits": pm.gptq(8),
    "gptq in any order": pm.gptq(desc_act=True),
    "gptq_v2 in any order": pm.gptq(desc_act=True, version="gptq_v2"),
    "awq": pm.awq(),
    "awq by row": pm.awq(None),
    "mxfp4": pm.mxfp4(),
    "nvfp4 of modelopt": pm.nvfp4("modelopt"),
    "nvfp4 of compressed-tensors": pm.nvfp4("compressed-tensors"),
}
ONE_OF_A_KIND = ("int4 with zeros", "int4 with zeros in any order", "int8", "gptq", "gptq in any order", "awq",
                 "mxfp4", "nvfp4 of modelopt", "nvfp4 of compressed-tensors")  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: rm.make_model(root / name, name, dtype="bfloat16", **FAMILIES[name]) for name in FAMILIES}


def check(folder, plain, ranks):
    for parallel in ranks:
        expected, actual = (fp8.effective(fp8.load_model(path, parallel)) for path in (plain, folder))
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, actual[name]), (parallel, name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_holds_what_the_numbers_stand_for(folders, tmp_path, kind):
    check(*pm.write(folders["llama3"], tmp_path / "packed", KINDS[kind]), [*sm.all_ranks(1), *sm.all_ranks(2)])


@pytest.mark.parametrize("kind", ONE_OF_A_KIND)
def test_experts_are_held_as_they_are(folders, tmp_path, kind):
    ranks = [*sm.all_ranks(1), *sm.all_ranks(2), *sm.all_ranks(2, 2)]
    check(*pm.write(folders["qwen3_moe"], tmp_path / "packed", KINDS[kind]), ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_fused_matrices_are_held_as_they_are(folders, tmp_path, kind):
    check(*pm.write(folders["phi3"], tmp_path / "packed", KINDS[kind]), [*sm.all_ranks(1), *sm.all_ranks(2)])


@pytest.mark.parametrize("name", ["mlp.gate_up_proj.qweight", "mlp.gate_up_proj.scales", "self_attn.qkv_proj.qzeros"])
def test_a_fused_tensor_of_one_part_is_no_part_of_each(folders, tmp_path, name):
    folder, _ = pm.write(folders["phi3"], tmp_path / "packed", KINDS["awq"])
    name = f"model.layers.1.{name}"

    def halve(tensors):
        tensors[name] = tensors[name].chunk(2, dim=1)[0].contiguous()

    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\..*"):
        fp8.load_model(changed(folder, tmp_path / "other", halve))


@pytest.mark.parametrize("kind", ["int4 with zeros", "awq", "gptq in any order", "nvfp4 of modelopt"])
def test_latent_attention_with_such_weights(folders, tmp_path, kind):
    """Queries and results are taken over kv_b_proj as it is dequantised."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64,
             "qk_nope_head_dim": 24, "v_head_dim": 24, "intermediate_size": 96, "moe_intermediate_size": 32,
             "attention_bias": False}  # fmt: skip
    model = rm.make_model(tmp_path / "model", "deepseek_v3", dtype="bfloat16", **sizes)
    folder, plain = pm.write(model, tmp_path / "packed", KINDS[kind])
    check(folder, plain, sm.all_ranks(2, 2))
    fp8.check_answers(folder, plain)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3_next", "awq"), ("qwen3_5", "int4 with zeros"), ("qwen3_next", "nvfp4 of modelopt")],
)
def test_linear_layers_with_such_weights(folders, tmp_path, family, kind):
    """What gives a head's few numbers stays as it is, as in published checkpoints."""
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
             "linear_value_head_dim": 16, "intermediate_size": 96, "head_dim": 32}  # fmt: skip
    if family == "qwen3_next":
        sizes |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    model = rm.make_model(tmp_path / "model", family, dtype="bfloat16", **sizes)
    numbers = [f"model.layers.{layer}.linear_attn.in_proj_{part}" for layer in range(3) for part in ("ba", "b", "a")]
    left_out = {KINDS[kind].left_out: [*numbers, "lm_head"]}
    folder, plain = pm.write(model, tmp_path / "packed", KINDS[kind], **left_out)
    check(folder, plain, sm.all_ranks(2))
    fp8.check_answers(folder, plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ONE_OF_A_KIND)
def test_the_engine_answers_as_transformers_over_the_plain_weights(folders, tmp_path, family, kind):
    folder, plain = pm.write(folders[family], tmp_path / "packed", KINDS[kind])
    fp8.check_answers(folder, plain)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3_moe", kind) for kind in ONE_OF_A_KIND]
    + [("phi3", kind) for kind in ("awq", "gptq in any order", "int4 with zeros", "nvfp4 of modelopt")],
)
def test_clones_of_another_topology_hold_the_same_bytes_and_are_compared_with_the_digest(
    folders, tmp_path, monkeypatch, family, kind
):
    """From tp 2 to tp 1, from tp 1 to ep 2, from ep 2 to tp 2; a changed byte of any grid is noticed."""
    monkeypatch.setenv("RAMET_DIGEST_DIR", str(tmp_path / "digests"))
    folder, _ = pm.write(folders[family], tmp_path / "packed", KINDS[kind])
    table = compute_table(str(folder))
    arenas = {
        sizes: [fp8.load_arena(folder, sm.build_model(folder, parallel)) for parallel in sm.all_ranks(*sizes)]
        for sizes in ((1, 1), (2, 1), *([(2, 2)] if family == "qwen3_moe" else []))
    }
    for seed, client in (((2, 1), (1, 1)), ((1, 1), (2, 2)), ((2, 2), (2, 1))):
        if not {seed, client} <= arenas.keys():
            continue
        sources = [ArenaSource(f"rank {rank}", arena.manifest) for rank, arena in enumerate(arenas[seed])]
        for expected in arenas[client]:
            memory = bytearray(expected.manifest.arena_nbytes)
            ops = plan(expected.manifest, sources).ops
            sm.execute(ops, [arena.memory for arena in arenas[seed]], memoryview(memory))
            assert memory == expected.memory[: len(memory)]
    for arena in arenas[2, 1]:
        check = check_bands(arena, table)
        assert (check.wrong, check.unchecked) == (set(), {})
    arena, entries = arenas[2, 1][1], [e for e in arenas[2, 1][1].manifest.entries if "layers.0" in e.name]
    for entry in entries:
        arena.memory[entry.offset + entry.nbytes - 1] ^= 1
    assert check_bands(arena, table).wrong == {entry.name for entry in entries}


def is_plain(name):
    return "layers.1." in name or "o_proj" in name


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("awq", ["model.layers.1", "o_proj"]),
        ("gptq", {"-:model.layers.1": {}, r"-:.*\.o_proj": {}}),
        ("int4", ["re:model.layers.1.*", "re:.*o_proj$", "lm_head"]),
        ("nvfp4 of modelopt", ["model.layers.1.*", "*o_proj", "lm_head"]),
    ],
)
def test_layers_that_are_left_out_keep_their_type(folders, tmp_path, kind, names):
    left_out = {KINDS[kind].left_out: names}
    folder, plain = pm.write(folders["llama3"], tmp_path / "packed", KINDS[kind], is_plain, **left_out)
    check(folder, plain, sm.all_ranks(1))
    layers = fp8.load_model(folder).model.layers
    assert layers["1"].self_attn.qkv_proj.weight.dtype == torch.bfloat16
    assert layers["0"].self_attn.qkv_proj.weight.dtype in (torch.int32, torch.uint8)


def test_a_rank_that_would_cut_a_word_is_refused(tmp_path):
    source = rm.make_model(tmp_path / "model", "llama3", dtype="bfloat16", intermediate_size=200, tokenizer=False)
    for kind in ("int4", "awq"):
        folder, _ = pm.write(source, tmp_path / kind, KINDS[kind])
        with pytest.raises(ValueError, match=r"from 0 to 100, would cut a word of 8 packed numbers"):
            fp8.load_model(folder, ParallelConfig(tp_size=2))


def changed(folder, target, change):
    rm.without_weights(folder, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("gptq", ".g_idx", torch.arange(128, dtype=torch.int32) // 16 % 7, "the config says no desc_act"),
        ("gptq", ".bias", torch.ones(208).half(), "is a bias that the model has no place for"),
        (
            "gptq",
            ".qzeros",
            torch.zeros(8, 13, dtype=torch.int32),
            r"has the shape \(8, 13\), the model needs \(8, 26\)",
        ),
        ("awq", ".qweight", torch.zeros(128, 26), "is float32, but .* says that it is int32"),
        ("awq", ".scales", torch.zeros(8, 208, dtype=torch.int32), "is int32, but belongs to a quantised matrix as"),
        ("int4", ".weight_zero_point", torch.zeros(26, 8, dtype=torch.int32), "tensors that the model does not have"),
        ("int4", ".weight_scale", torch.zeros(208, 4), r"says blocks of 1 x 16"),
    ],
)
def test_files_that_contradict_the_config_are_refused(folders, tmp_path, kind, name, value, message):
    folder, _ = pm.write(folders["llama3"], tmp_path / "packed", KINDS[kind])
    other = changed(folder, tmp_path / "other", lambda tensors: tensors.update({LAYER + name: value}))
    with pytest.raises(ValueError, match=message):
        fp8.load_model(other)


def test_files_in_another_format_than_the_config_says_are_refused(folders, tmp_path):
    folder, _ = pm.write(folders["llama3"], tmp_path / "packed", KINDS["awq"])
    fp8.change_config(folder, quantization_config=KINDS["int4"].section)
    with pytest.raises(ValueError, match=r"says that weights are int4, but .* holds none"):
        fp8.load_model(folder)
    fp8.change_config(folder, quantization_config=None)
    with pytest.raises(
        ValueError, match=r"lacks .*; it has model.*qweight, a quantised weight of which the model's conf"
    ):
        fp8.load_model(folder)


@pytest.mark.parametrize("kind", ["int4 with zeros in any order", "int8", "gptq", "awq", "mxfp4", "nvfp4 of modelopt"])
def test_dummy_weights_answer(folders, tmp_path, kind):
    folder, _ = pm.write(folders["llama3"], tmp_path / "packed", KINDS[kind])
    engine = EngineHarness(rm.without_weights(folder, tmp_path / "config"), device="cpu", load_format="dummy")
    result = engine.generate(rm.random_prompts([5]), max_new_tokens=2, return_logprob=True)[0]
    assert len(result.token_ids) == 2 and torch.tensor(result.output_logprobs).isfinite().all()


def test_every_mxfp4_byte_is_what_transformers_says():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (1, 64, 8, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(90, 160, (1, 64, 8), dtype=torch.uint8, generator=generator)
    assert len(blocks.unique()) == 256
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T
    index = {"values": GridIndex(None, 2, 0), "scales": GridIndex(None, 32, 0)}
    tensors = {"values": blocks[0].flatten(1), "scales": scales[0]}
    weight = QuantizedWeight(WeightLayout(mxfp4(), 64, 256, index), tensors)
    assert torch.equal(dequantize(weight, torch.float32), expected)


def stacked_experts(rows, columns):
    """A rank's part of four matrices of 48 rows and 128 columns that a checkpoint has in one tensor."""
    layer = torch.nn.Module()
    shape = (4, rows[1] - rows[0], columns[1] - columns[0])
    box = WeightBox("mlp.experts.up_proj", ((0, 4), rows, columns), tuple((0, extent) for extent in shape))
    layer.weight = declare_weight(shape, torch.bfloat16, [box], all_columns=128)
    layer.quantisable_weights = ("weight",)
    return layer


@pytest.mark.parametrize("cut", [((0, 48), (0, 128)), ((16, 48), (0, 128)), ((0, 48), (80, 128))])
def test_stacked_experts_in_blocks_are_what_transformers_makes_of_them(tmp_path, cut):
    """As gpt-oss's files have them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (4, 48, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, (4, 48, 4), dtype=torch.uint8, generator=generator)
    name = "mlp.experts.up_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "model.safetensors")
    config = read_quantization({"quantization_config": {"quant_method": "mxfp4"}}, None, "/models/m", None)
    layer = stacked_experts(*cut)
    declare_quantised(layer, config)
    manifest = build_weight_manifest(
        layer.named_parameters(), model_name="m", revision="", dtype="bfloat16", quantization="mxfp4", role="target",
        parallel=ParallelConfig(tp_size=2),
    )  # fmt: skip
    sm.load_from_disk(tmp_path, manifest).bind(layer)
    weight = weight_of(layer, "weight")
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    for expert in range(4):
        rows, columns = (slice(*extent) for extent in cut)
        assert torch.equal(dequantize(weight[expert], torch.float32), expected[expert, rows, columns])


def test_blocks_of_what_is_not_stacked_are_refused_before_memory_is_taken(folders, tmp_path):
    folder = rm.without_weights(folders["qwen3_moe"], tmp_path / "config")
    fp8.change_config(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ValueError, match=r"mxfp4 is known for stacked experts alone, and does not leave out model"):
        sm.build_model(folder, ParallelConfig())
