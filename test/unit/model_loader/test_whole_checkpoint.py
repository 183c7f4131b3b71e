"""Owns the tests that every rank of every topology notices what the files hold too much, too little, or otherwise."""

import json

import fp8_models as fp8
import packed_models as packed
import pytest
import random_models as rm
import sharded_models as sm
import torch
from engine_harness import EngineHarness
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_loader.checkpoint.describe_model import describe_whole_model
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.model_loader.checkpoint.tied_head import folder_has_own_head
from safetensors.torch import load_file, save_file

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOPOLOGIES = {
    "whole": {},
    "ep2": {"tp_size": 2, "ep_size": 2},
    "pp3tp2": {"pp_size": 3, "tp_size": 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    families = {"llama3": {}, "qwen3_moe": {}, "mixtral": {}, "glm4_moe": {}}
    return {name: rm.make_model(root / name, name, dtype="bfloat16", **families[name]) for name in families}


def changed(source, target, change, **config):
    """The model in `source` with other tensors."""
    rm.without_weights(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return fp8.change_config(target, **config) if config else target


def refusals(folder, topology):
    """What ranks of every stage, or of all experts, say of the files."""
    said = []
    for parallel in sm.ranks_of(**TOPOLOGIES[topology])[::2]:
        with pytest.raises(ValueError) as error:
            fp8.load_model(folder, parallel)
        said.append(str(error.value))
    return said


def assert_equal_models(folder, other, topology):
    """Every rank reads the same weights from both folders."""
    for parallel in sm.ranks_of(**TOPOLOGIES[topology]):
        expected = dict(fp8.load_model(folder, parallel).named_parameters())
        found = dict(fp8.load_model(other, parallel).named_parameters())
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def add(name, *shape, dtype=torch.bfloat16):
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


SURPLUS = {
    "a bias": ("llama3", "model.layers.1.self_attn.q_proj.bias", 128),
    "another layer": ("llama3", "model.layers.3.input_layernorm.weight", 128),
    "a norm of heads": ("llama3", "model.layers.0.self_attn.q_norm.weight", 16),
    "a shared expert": ("qwen3_moe", "model.layers.2.mlp.shared_expert.up_proj.weight", 40),
    "an expert too many": ("qwen3_moe", "model.layers.0.mlp.experts.6.up_proj.weight", 40),
    "an expert's bias": ("qwen3_moe", "model.layers.0.mlp.experts.5.up_proj.bias", 40),
    "a router's correction": ("mixtral", "model.layers.0.block_sparse_moe.gate.e_score_correction_bias", 4),
    "a layer that drafts, of a model without": ("glm4_moe", "model.layers.3.enorm.weight", 64),
    "a scale of a plain weight": ("llama3", "model.layers.0.mlp.up_proj.weight_scale", 1),
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_surplus_is_named_by_every_rank(folders, tmp_path, topology):
    for kind, (family, name, *shape) in SURPLUS.items():
        if topology == "ep2" and family == "llama3":
            continue
        folder = changed(folders[family], tmp_path / kind, add(name, *shape))
        for message in refusals(folder, topology):
            assert "has tensors that the model does not have" in message and name in message


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_what_lacks_or_has_another_shape_is_named_by_every_rank(folders, tmp_path, topology):
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    lacking = changed(folders["qwen3_moe"], tmp_path / "lacking", lambda tensors: tensors.pop(name))
    assert all(f"lacks {name}" in message for message in refusals(lacking, topology))
    larger = changed(folders["qwen3_moe"], tmp_path / "larger", add(name, 64, 48))
    assert all(f"{name} has the shape (64, 48), the model needs (64, 40)" in m for m in refusals(larger, topology))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_sound_and_harmless_files_are_read_by_every_rank(folders, tmp_path, topology):
    for family, folder in folders.items():
        if topology == "ep2" and family == "llama3":
            continue
        other = changed(folder, tmp_path / family, add("model.layers.1.self_attn.rotary_emb.inv_freq", 8))
        assert_equal_models(folder, other, topology)


def test_layers_that_draft_tokens_are_left_out(folders, tmp_path):
    """GLM's files have one behind the model's own, and its config says how many there are."""
    drafting = fp8.change_config(
        rm.without_weights(folders["glm4_moe"], tmp_path / "whole"), num_nextn_predict_layers=1
    )
    tensors = load_file(folders["glm4_moe"] / "model.safetensors")
    for number, is_read in ((3, True), (4, False)):
        extra = {f"model.layers.{number}.enorm.weight": torch.zeros(64)}
        save_file(tensors | extra, drafting / "model.safetensors")
        if is_read:
            assert_equal_models(folders["glm4_moe"], drafting, "ep2")
        else:
            assert all("model.layers.4.enorm.weight" in message for message in refusals(drafting, "ep2"))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_stacked_experts_of_other_stages_have_their_familys_names(tmp_path, family):
    listed, stacked = (
        rm.make_model(tmp_path / str(stacks), family, dtype="bfloat16", stacked_experts=stacks, tokenizer=False)
        for stacks in (False, True)
    )
    for topology in ("pp3tp2", "ep2"):
        assert_equal_models(listed, stacked, topology)


def test_an_index_that_does_not_name_a_tensor_is_refused(tmp_path):
    folder = rm.make_model(tmp_path, "llama3", dtype="bfloat16", max_shard_size="100KB", tokenizer=False)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"the index does not name model.norm.weight"):
        fp8.load_model(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
         "b lies over a"),
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',
         "it names a twice"),
    ],
)  # fmt: skip
def test_tensors_in_one_place_or_of_one_name_are_refused(tmp_path, header, message):
    raw = header.encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(ValueError, match=message):
        folder_has_own_head(str(tmp_path))


WRONG = {  # tensors and config that contradict each other, and what is said of them
    "plain config, fp8 files": ("blocks", {"quantization_config": None}, lambda t: None, None,
                                r"is float8_e4m3fn, but .* does not say that it is quantised"),
    "plain config, fp8 files, --quantization fp8": ("blocks", {"quantization_config": None}, lambda t: None, "fp8",
                                                    "has no quantization_config that says so"),
    "no blocks in the config": ("blocks", {"quantization_config": {"quant_method": "fp8"}}, lambda t: None, None,
                                r"weight_scale has the shape \(.*says no blocks \(weight_block_size\)"),
    "other blocks in the config": (
        "blocks", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}, lambda t: None, None,
        "says blocks of 32 x 32"),
    "fp8 config, plain files": ("plain", {"quantization_config": {"quant_method": "fp8"}}, lambda t: None, None,
                                r"says that weights are fp8, but .* holds none"),
    "one plain layer": (
        "blocks", {}, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(208, 128)}), None,
        r"model.layers.1.mlp.up_proj.weight is float32, but .* says that it is float8_e4m3fn"),
    "scales of integers": (
        "blocks", {}, lambda t: t.update({n: s.to(torch.int8) for n, s in t.items() if n.endswith("scale_inv")}), None,
        r"weight_scale_inv is int8, but belongs to a quantised matrix as float32, .* or uint8"),
    "integers": ("plain", {}, lambda t: t.update({"model.norm.weight": torch.ones(128, dtype=torch.int32)}), None,
                 "model.norm.weight is int32; a weight must be"),
    "integers in a part": ("plain", {}, lambda t: t.update({"model.layers.2.self_attn.q_proj.weight":
                                                            torch.ones(128, 128, dtype=torch.int8)}), None,
                           "model.layers.2.self_attn.q_proj.weight is int8; a weight must be"),
    "no scales": ("blocks", {}, lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"), None,
                  r"lacks model.layers.0.mlp.up_proj.weight_scale_inv \(the scales"),
    "one scale for many blocks": (
        "blocks", {}, lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.tensor(0.5)}), None,
        r"has the shape \(\), the model needs \(13, 8\).*says blocks of 16 x 16"),
    "both names of scales": (
        "blocks", {}, lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": torch.tensor(0.5)}), None,
        "has tensors that the model does not have: model.layers.0.mlp.up_proj.weight_scale in"),
    "scales no number": (
        "ue8m0", {}, lambda t: t["model.layers.0.mlp.up_proj.weight_scale_inv"].view(torch.uint8).fill_(255), None,
        "holds scales that are no numbers"),
}  # fmt: skip


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_weight_of_integers_is_named_by_every_rank(folders, tmp_path, topology):
    """Also by those that don't hold it, and by its own name, not that of the parameter that it is a part of."""
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    folder = changed(folders["qwen3_moe"], tmp_path / "x", add(name, 40, 64, dtype=torch.bool))
    assert all(f"{name} is bool" in said for said in refusals(folder, topology))


@pytest.mark.parametrize("case", WRONG)
def test_files_and_config_that_contradict_each_other_are_refused(folders, tmp_path, case):
    kind, config, change, quantization, message = WRONG[case]
    folder = folders["llama3"]
    if kind != "plain":
        dtype = torch.float8_e8m0fnu if kind == "ue8m0" else torch.float32
        folder = fp8.write_fp8(folder, tmp_path / "fp8", "blocks", scale_dtype=dtype)
    folder = changed(folder, tmp_path / "changed", change, **config)
    with pytest.raises(ValueError, match=message):
        fp8.load_model(folder, quantization=quantization)


@pytest.mark.parametrize("format_", ["fp8", "fp8 left out", "AWQ"])
def test_head_weights_of_an_index_that_are_quantised_are_named_before_memory_is_taken(tmp_path, format_):
    """Tools may quantise them as any linear layer; here they are computed as they are."""
    plain = rm.make_model(tmp_path / "plain", "deepseek_v32", dtype="bfloat16", tokenizer=False, index_head_dim=32)
    name = "model.layers.1.self_attn.indexer.weights_proj"
    if format_ == "AWQ":
        whole, _ = packed.write(plain, tmp_path / "whole", packed.awq())

        def quantise(tensors):
            parts, _ = packed.awq().quantise(tensors.pop(f"{name}.weight").float())
            tensors.update({name + end: part.contiguous() for end, part in parts.items()})
    else:
        whole = fp8.write_fp8(plain, tmp_path / "whole", "blocks")

        def quantise(tensors):
            weight, scale = fp8.quantize_blocks(tensors[f"{name}.weight"], (16, 16), torch.float32)
            tensors |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scale}

    fp8.load_model(whole)
    section = json.loads((whole / "config.json").read_text())["quantization_config"]
    left_out = {"modules_to_not_convert": ["weights_proj"]} if format_ == "fp8 left out" else {}
    folder = changed(whole, tmp_path / "changed", quantise, quantization_config=section | left_out)
    what = {"fp8": "is float8_e4m3fn: .*", "AWQ": "it has .*weights_proj.qweight: .*"}.get(format_)
    message = f"{what}{name}.weight is computed unquantised here.* with {name} among the modules that are not"
    if what is None:
        message = f"{name}.weight is float8_e4m3fn, but .* does not say that it is quantised"
    model = sm.build_model(folder, ParallelConfig())
    with pytest.raises(ValueError, match=message):  # when they are opened, which is what a rank does first of all
        CheckpointSource(str(folder), describe_whole_model(model.config, sm.make_manifest(model)))


def test_a_head_that_differs_from_the_embedding_is_found(folders, tmp_path):
    def with_head(tensors):
        tensors[HEAD] = tensors[EMBEDDING].clone()

    def with_other_head(tensors):
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][-1, -1] += 1

    def with_wider_head(tensors):
        tensors[HEAD] = tensors[EMBEDDING].float()

    folder = folders["llama3"]
    assert not folder_has_own_head(str(folder))
    assert not folder_has_own_head(str(changed(folder, tmp_path / "equal", with_head)))
    assert folder_has_own_head(str(changed(folder, tmp_path / "wider", with_wider_head)))
    other = changed(folder, tmp_path / "other", with_other_head)
    assert folder_has_own_head(str(other))
    assert all("holds an output head of its own" in message for message in refusals(other, "pp3tp2"))


def test_the_engine_answers_with_the_files_own_head(folders, tmp_path):
    """As if the config said so; the manifest says it to clients that have no files."""

    def with_head(tensors):
        tensors[HEAD] = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(3)) / 10

    own = changed(folders["llama3"], tmp_path / "own", with_head)
    said = changed(own, tmp_path / "said", lambda tensors: None, tie_word_embeddings=False)
    engines = [EngineHarness(folder, device="cpu") for folder in (own, said, folders["llama3"])]
    answers = [engine.generate(rm.random_prompts([20]), max_new_tokens=6)[0].token_ids for engine in engines]
    assert answers[0] == answers[1] != answers[2]
    assert [engine.runner.manifest.is_tied for engine in engines] == [False, False, True]
