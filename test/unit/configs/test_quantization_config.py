"""Owns the tests of what configs say of quantised weights: read in all spellings, refused by name where not served."""

import json

import pytest
import random_models as rm
from ramet.srt.configs.composed_families import PREFIXES
from ramet.srt.configs.left_out_modules import ModuleNaming
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.quantization_readers import read_quantization
from ramet.srt.configs.weight_format import (
    FORMATS,
    WHOLE,
    awq,
    fp8_blocks,
    fp8_rows,
    gptq,
    int8,
    mxfp4,
    nvfp4,
    packed_int,
)

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel",
           "observer": "minmax", "observer_kwargs": {}, "group_size": None, "block_structure": None,
           "actorder": None}  # fmt: skip
TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
GROUP = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": TOKENS, "output_activations": None}
CT = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
      "global_compression_ratio": 1.5, "kv_cache_scheme": None, "ignore": ["lm_head"], "sparsity_config": {},
      "transform_config": {}, "version": "0.12.2", "config_groups": {"group_0": GROUP}}  # fmt: skip
MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
}
NEWER_MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "ignore": ["lm_head"],
    "config_groups": {"g": {}},
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": {},
}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
NVFP4 = MXFP4 | {"strategy": "tensor_group", "group_size": 16}
MODELOPT_FP4 = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8"}}


def read(section=None, modelopt=None, wanted=None):
    hf_config = {} if section is None else {"quantization_config": section}
    return read_quantization(hf_config, modelopt, "/models/m", wanted)


def ct_with(group=None, weights=None, **section):
    return CT | {"config_groups": {"group_0": GROUP | (group or {}) | {"weights": WEIGHTS | (weights or {})}}} | section


@pytest.mark.parametrize(
    ("section", "modelopt", "expected"),
    [
        (FP8, None, fp8_blocks(128, 128, multiplies_fp8=True)),
        (FP8 | {"scale_fmt": "ue8m0", "modules_to_not_convert": None}, None,
         fp8_blocks(128, 128, multiplies_fp8=True)),
        ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, None, fp8_rows()),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}, None,
         fp8_rows()),
        ({"quant_method": "mxfp8", "activation_scheme": "dynamic"}, None, fp8_blocks(1, 32)),
        (CT, None, fp8_rows()),
        (ct_with({"input_activations": None}), None, fp8_blocks(1, WHOLE)),
        (ct_with(weights={"strategy": "block", "block_structure": [128, 128]}), None,
         fp8_blocks(128, 128, multiplies_fp8=True)),
        (ct_with(weights={"strategy": "block", "block_structure": "128x64"}), None,
         fp8_blocks(128, 64, multiplies_fp8=True)),
        (ct_with(weights={"strategy": "group", "group_size": 32}), None, fp8_blocks(1, 32)),
        (ct_with(weights={"strategy": "group", "group_size": 32}, format="mxfp8-quantized"), None, fp8_blocks(1, 32)),
        (ct_with(weights={"strategy": "tensor"}), None, fp8_rows()),
        (None, MODELOPT, fp8_rows()),
        (NEWER_MODELOPT, MODELOPT, fp8_rows()),
        (NEWER_MODELOPT, None, fp8_rows()),
    ],
)  # fmt: skip
def test_what_is_served_is_read(section, modelopt, expected):
    config = read(section, modelopt, wanted="fp8")  # which changes nothing
    assert config.format == expected and config.name == "fp8" and not config.is_online


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False,
        "checkpoint_format": "gptq", "damp_percent": 0.1, "static_groups": False, "meta": {"a": 1},
        "model_name_or_path": None, "pack_dtype": "int32"}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM", "zero_point": True, "backend": "autoawq"}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (ct_with(weights=INT4, format="pack-quantized"),
         packed_int(4, 128, has_zeros=False, has_column_groups=False)),
        (ct_with({"format": "pack-quantized"}, INT4 | {"num_bits": 8, "strategy": "channel", "symmetric": False}),
         packed_int(8, WHOLE, has_zeros=True, has_column_groups=False)),
        (ct_with(weights=INT4 | {"actorder": "weight"}, format="pack-quantized"),
         packed_int(4, 128, has_zeros=False, has_column_groups=False)),
        (ct_with(weights=INT4 | {"actorder": "group"}, format="pack-quantized"),
         packed_int(4, 128, has_zeros=False, has_column_groups=True)),
        (ct_with({"input_activations": TOKENS | {"type": "int"}}, {"type": "int"}, format="int-quantized"),
         int8(WHOLE)),
        (ct_with({"input_activations": None}, {"type": "int"}, format="naive-quantized"), int8(WHOLE)),
        (GPTQ, gptq(4, 128, zeros_less_one=True, has_column_groups=False)),
        (GPTQ | {"checkpoint_format": None}, gptq(4, 128, zeros_less_one=True, has_column_groups=False)),
        (GPTQ | {"checkpoint_format": "gptq_v2", "bits": 8, "group_size": -1, "desc_act": True},
         gptq(8, WHOLE, zeros_less_one=False, has_column_groups=True)),
        (GPTQ | {"method": "gptq", "format": "gptq", "offload_to_disk": True, "offload_to_disk_path": "./x",
                 "pack_impl": "cpu", "hyb_act": False, "v2": False},
         gptq(4, 128, zeros_less_one=True, has_column_groups=False)),
        (AWQ, awq(64)),
        (AWQ | {"method": "awq", "format": "gemm", "checkpoint_format": "gemm", "desc_act": False, "lm_head": False,
                "pack_dtype": "int32", "version": None, "meta": {}}, awq(64)),
        (ct_with({"input_activations": None}, MXFP4, format="mxfp4-pack-quantized"), mxfp4()),
        (ct_with({"input_activations": TOKENS | {"num_bits": 4}}, NVFP4, format="nvfp4-pack-quantized"),
         nvfp4(".weight_packed", ".weight_global_scale", divides=True)),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
         mxfp4("_blocks", "_scales")),
        (NEWER_MODELOPT | {"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"},
         nvfp4(".weight", ".weight_scale_2", divides=False)),
    ],
)  # fmt: skip
def test_packed_formats_are_read(section, expected):
    config = read(section)
    assert config.format == expected
    with pytest.raises(ValueError, match=f"--quantization fp8 is for plain weights; .*says {expected.name}"):
        read(section, wanted="fp8")


@pytest.mark.parametrize(
    ("section", "word"),
    [
        (ct_with(weights=INT4 | {"actorder": "other"}, format="pack-quantized"), "actorder 'other'"),
        (ct_with(weights=INT4 | {"num_bits": 3}, format="pack-quantized"), "num_bits 3"),
        (ct_with(weights=INT4 | {"strategy": "token"}, format="pack-quantized"), "strategy 'token'"),
        (ct_with({"input_activations": TOKENS | {"num_bits": 16}}, INT4, format="pack-quantized"), "num_bits 16"),
        (ct_with(weights={"type": "int", "symmetric": False}, format="int-quantized"), "symmetric False"),
        (GPTQ | {"bits": 3}, "bits 3"),
        (GPTQ | {"group_size": 0}, "group_size must be"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (GPTQ | {"lm_head": True}, "lm_head True"),
        (GPTQ | {"is_marlin_format": True}, "'is_marlin_format'"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "'+:.*down.*' has settings of its own"),
        (GPTQ | {"modules_in_block_to_quantize": ["q_proj"]}, "must be a list of lists"),
        (AWQ | {"bits": 8}, "bits 8"),
        (AWQ | {"zero_point": False}, "zero_point False"),
        (AWQ | {"version": "gemv"}, "version 'gemv'"),
        (AWQ | {"checkpoint_format": "gemv_fast"}, "checkpoint_format 'gemv_fast'"),
        (AWQ | {"method": "gptq"}, "method 'gptq'"),
        (GPTQ | {"method": "qqq"}, "method 'qqq'"),
    ],
)  # fmt: skip
def test_packed_formats_that_are_not_served_are_refused(section, word):
    with pytest.raises(ValueError) as error:
        read(section)
    assert word in str(error.value) and "/models/m/config.json" in str(error.value)


def test_formats_have_names_and_sizes_of_their_own():
    """What instances compare before weights move."""
    assert read(None, MODELOPT_FP4).format == read(NEWER_MODELOPT | {"quant_algo": "NVFP4"}, MODELOPT_FP4).format
    sections = [FP8, CT, ct_with(weights=MXFP4, format="mxfp4-pack-quantized"),
                NEWER_MODELOPT | {"quant_algo": "NVFP4"}, ct_with(weights=INT4, format="pack-quantized"), GPTQ,
                GPTQ | {"desc_act": True}, GPTQ | {"group_size": 32}, GPTQ | {"bits": 8}, AWQ]  # fmt: skip
    configs = [read(section) for section in sections]
    assert len({(config.name, *sorted(config.dimensions.items())) for config in configs}) == len(sections)
    assert {config.name for config in configs} < set(FORMATS)


def test_plain_models_are_quantised_where_that_is_wanted():
    assert read() is None and read({}) is None and read(None, {"quantization": {"quant_algo": None}}) is None
    assert read(wanted="fp8").is_online


@pytest.mark.parametrize(
    ("section", "word"),
    [(method, repr(method["quant_method"])) for method in (
        {"quant_method": "bitsandbytes"},
        {"quant_method": "gguf"}, 
        {"quant_method": "quark"}, {"quant_method": None, "bits": 4},
    )]
    + [
        ([1], "must be an object"),
        (FP8 | {"fmt": "e5m2"}, "fmt 'e5m2'"),
        (FP8 | {"scale_fmt": "e4m3"}, "scale_fmt 'e4m3'"),
        (FP8 | {"expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
        (FP8 | {"weight_block_size": [128]}, "two positive integers"),
        (FP8 | {"weight_block_size": [128, 0]}, "two positive integers"),
        (FP8 | {"modules_to_convert": ["model.embed_tokens"]}, "'modules_to_convert'"),
        (FP8 | {"modules_to_not_convert": "lm_head"}, "list of names"),
        (FP8 | {"modules_to_not_convert": ["("]}, "no regular expression"),
        (FP8 | {"kv_cache_scheme": {"num_bits": 8}}, "type None"),
        (FP8 | {"kv_cache_scheme": "int8"}, "kv_cache_scheme must be an object"),
        (FP8 | {"activation_scheme": "blockwise"}, "activation_scheme 'blockwise'"),
        (ct_with(format="pack-quantized"), "type 'float'"),
        (ct_with(format="int-quantized"), "type 'float'"),
        (ct_with(format="marlin-24"), "format 'marlin-24'"),
        (ct_with(format="nvfp4-pack-quantized"), "num_bits 8"),
        (ct_with(weights=MXFP4 | {"group_size": 16}, format="mxfp4-pack-quantized"), "group_size 16"),
        (ct_with(weights=MXFP4 | {"strategy": "channel"}, format="mxfp4-pack-quantized"), "strategy 'channel'"),
        (ct_with(weights={"num_bits": 4}), "num_bits 4"),
        (ct_with(weights={"type": "int"}), "type 'int'"),
        (ct_with(weights={"symmetric": False}), "symmetric False"),
        (ct_with(weights={"strategy": "group", "group_size": 0}), "group_size must be a positive integer"),
        (ct_with(weights={"strategy": "tensor_group"}), "strategy 'tensor_group'"),
        (ct_with(weights={"actorder": "group"}), "'actorder'"),
        (ct_with(weights={"block_structure": [128, 128]}), "makes no sense"),
        (ct_with({"targets": ["re:.*mlp.*"]}), "targets"),
        (ct_with({"output_activations": TOKENS}), "'output_activations'"),
        (ct_with({"input_activations": TOKENS | {"num_bits": 4}}), "num_bits 4"),
        (ct_with(config_groups={"a": GROUP, "b": GROUP}), "must hold one group; it holds a, b"),
        (ct_with(config_groups={}), "must hold one group"),
        (ct_with(kv_cache_scheme={"num_bits": 8, "type": "int"}), "type 'int'"),
        (ct_with(transform_config={"config_groups": {"u": {}}}), "'transform_config'"),
        (ct_with(sparsity_config={"format": "sparse-24-bitmask"}), "format 'sparse-24-bitmask'"),
        (ct_with(ignore=["re:("]), "no regular expression"),
        (NEWER_MODELOPT | {"quant_algo": "NVFP4", "group_size": 32}, "group_size 32"),
        (NEWER_MODELOPT | {"quant_algo": "NVFP4_AWQ"}, "'NVFP4_AWQ'"),
        (NEWER_MODELOPT | {"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "num_bits 4"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_its_name(section, word):
    with pytest.raises(ValueError) as error:
        read(section, wanted="fp8")  # which does not get round it
    assert word in str(error.value) and "/models/m/config.json" in str(error.value)


@pytest.mark.parametrize(
    ("section", "plain"),
    [
        (FP8 | {"kv_cache_scheme": "static"}, FP8),
        (FP8 | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, FP8),
        (ct_with(kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor"}), ct_with()),
    ],
)
def test_a_cache_of_fp8_may_be_wished_for(section, plain):
    assert read(section) == read(plain)


@pytest.mark.parametrize(
    ("quantization", "word"),
    [
        ({"quant_algo": "NVFP4", "group_size": 32}, "group_size 32"),
        ({"quant_algo": "MXFP8"}, "'MXFP8'"),
        ({"quant_algo": "W4A16_AWQ"}, "'W4A16_AWQ'"),
        ({"quant_algo": "FP8_PB_WO"}, "'FP8_PB_WO'"),
        ({"quant_algo": "MIXED_PRECISION"}, "'MIXED_PRECISION'"),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo 'NVFP4'"),
        ({"quant_algo": "FP8", "has_zero_point": True}, "'has_zero_point'"),
        (None, "no object 'quantization'"),
    ],
)
def test_modelopts_file_alone_is_enough_to_be_refused(tmp_path, quantization, word):
    folder = rm.make_config(tmp_path, "llama3")
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    with pytest.raises(ValueError) as error:
        ModelConfig.from_path(str(folder))
    assert word in str(error.value) and "hf_quant_config.json" in str(error.value)


def test_files_that_contradict_each_other_are_refused():
    with pytest.raises(
        ValueError, match=r"config.json says fp8 by blocks of 128 x 128, hf_quant_config.json says fp8 by rows"
    ):
        read(FP8, MODELOPT)
    with pytest.raises(ValueError, match="hf_quant_config.json says no quantised weights"):
        read(FP8, {"quantization": {"quant_algo": None}})


NAME = "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize(
    ("pattern", "by_fp8", "by_ct", "by_modelopt"),
    [
        (NAME, True, True, True),
        ("model.layers.1", True, False, True),
        ("model.layers.1.mlp.gate", False, False, False),
        ("gate_proj", True, False, False),
        ("gate", False, False, False),
        ("model.layers.11", False, False, False),
        (r"model.layers.\d+.mlp.gate_proj", True, False, False),
        ("model.layers.1.*", True, False, True),
        ("*gate_proj", None, False, True),
        ("re:.*gate_proj$", False, True, False),
        ("re:model.layers.1.mlp", False, True, False),
        ("re:mlp", False, False, False),
        ("Linear", False, True, False),
    ],
)
def test_patterns_of_layers_that_are_left_out(pattern, by_fp8, by_ct, by_modelopt):
    if by_fp8 is not None:  # else it is no regular expression
        assert read(FP8 | {"modules_to_not_convert": [pattern]}).is_ignored(NAME) == by_fp8
    assert read(ct_with(ignore=[pattern])).is_ignored(NAME) == by_ct
    by_awq = read(AWQ | {"modules_to_not_convert": [pattern]}).is_ignored(NAME) if by_fp8 is not None else True
    assert by_awq == (by_fp8 is not False)
    file = {"quantization": {"quant_algo": "FP8", "exclude_modules": [pattern]}}
    assert read(None, file).is_ignored(NAME) == by_modelopt


COMPOSED = ModuleNaming(prefixes=PREFIXES)
FUSED = ModuleNaming(is_fused=True)
MIXTRAL = "model.layers.1.block_sparse_moe.experts.0.w3"
EXPERT = "model.layers.1.mlp.experts.12.down_proj"


@pytest.mark.parametrize(
    ("naming", "name", "method", "pattern", "expected"),
    [
        # What a text model's modules are called in the whole, by transformers before and since 4.52, and by themselves.
        (COMPOSED, NAME, "fp8", "model.language_model.layers.1.mlp.gate_proj", True),
        (COMPOSED, NAME, "fp8", "language_model.model.layers.1", True),
        (COMPOSED, NAME, "fp8", "model.layers.1", True),
        (COMPOSED, NAME, "fp8", "model.visual", False),
        (COMPOSED, NAME, "fp8", "language_model.model.layers.11", False),
        (COMPOSED, NAME, "ct", "model.language_model.layers.1.mlp.gate_proj", True),
        (COMPOSED, NAME, "ct", "model.language_model.layers.1", False),
        (COMPOSED, NAME, "ct", r"re:.*language_model\.layers\.1\..*", True),
        (COMPOSED, NAME, "ct", r"re:(?!.*language_model).*", False),  # all but the text model
        (COMPOSED, NAME, "ct", "re:model.visual.*", False),
        (COMPOSED, NAME, "awq", "language_model.model.layers.1", True),
        (COMPOSED, NAME, "awq", "visual", False),
        (COMPOSED, NAME, "gptq", r"model\.language_model\.layers\.1\.", True),
        (COMPOSED, NAME, "gptq", r"model\.layers\.1\.", False),
        (COMPOSED, NAME, "modelopt", "language_model.model.layers.1.*", True),
        (COMPOSED, NAME, "modelopt", "*language_model.layers.1*", True),
        (COMPOSED, NAME, "modelopt", "vision_tower*", False),
        # Tools see fused modules where the model's class has them; else they are other engines' names of parts.
        (FUSED, NAME, "fp8", "model.layers.1.mlp.gate_up_proj", True),
        (FUSED, NAME, "ct", r"re:.*gate_up_proj$", True),
        (FUSED, NAME, "ct", r"re:.*gate_proj$", False),
        (FUSED, NAME, "ct", r"re:.*\.(?!gate_up_proj$)[^.]*$", False),  # all but these
        (FUSED, NAME, "gptq", r".*gate_up_proj", True),
        (FUSED, "model.layers.1.self_attn.k_proj", "awq", "self_attn.qkv_proj", True),
        (FUSED, "model.layers.1.self_attn.k_proj", "modelopt", "*.qkv_proj", True),
        (ModuleNaming(), NAME, "fp8", "model.layers.1.mlp.gate_up_proj", True),
        (ModuleNaming(), NAME, "ct", "model.layers.1.mlp.gate_up_proj", True),
        (ModuleNaming(), NAME, "ct", r"re:.*\.(?!gate_proj$)[^.]*$", False),
        (ModuleNaming(), NAME, "modelopt", "*.gate_up_proj", True),
        (ModuleNaming(), NAME, "fp8", "model.layers.1.self_attn.qkv_proj", False),
        # All experts of a layer as one tensor.
        (ModuleNaming(), EXPERT, "fp8", "model.layers.1.mlp.experts.down_proj", True),
        (COMPOSED, EXPERT, "modelopt", "model.language_model.layers.1.mlp.experts.down_proj", True),
        (COMPOSED, EXPERT, "fp8", "model.language_model.layers.1.mlp.experts.gate_up_proj", False),
        (COMPOSED, EXPERT, "fp8", "model.language_model.layers.1.mlp.experts", True),
        (ModuleNaming(), MIXTRAL, "fp8", "model.layers.1.mlp.experts", True),
        (ModuleNaming(), MIXTRAL, "ct", "model.layers.1.mlp.experts.gate_up_proj", True),
        (ModuleNaming(), MIXTRAL, "fp8", "gate", False),
        (ModuleNaming(), MIXTRAL, "modelopt", "*.block_sparse_moe.experts*", True),
        # A decoder by itself.
        (ModuleNaming(prefixes=("model.", "")), NAME, "ct", "layers.1.mlp.gate_proj", True),
        (ModuleNaming(), NAME, "ct", "layers.1.mlp.gate_proj", False),
    ],
)  # fmt: skip
def test_lists_have_the_names_of_their_tools(naming, name, method, pattern, expected):
    sections = {
        "fp8": FP8 | {"modules_to_not_convert": [pattern]},
        "ct": ct_with(ignore=[pattern]),
        "awq": AWQ | {"modules_to_not_convert": [pattern]},
        "gptq": GPTQ | {"dynamic": {f"-:{pattern}": {}}},
        "modelopt": NEWER_MODELOPT | {"ignore": [pattern]},
    }
    config = read_quantization({"quantization_config": sections[method]}, None, "/models/m", None, naming)
    assert config.is_ignored(name) == expected


def test_blocks_of_gptq_name_fused_modules_where_the_class_has_them():
    section = GPTQ | {"modules_in_block_to_quantize": [["mlp.gate_up_proj"], ["mlp.down_proj"]]}
    for naming, expected in ((FUSED, False), (ModuleNaming(), True)):
        config = read_quantization({"quantization_config": section}, None, "/models/m", None, naming)
        assert config.is_ignored(NAME) is expected


def test_the_family_says_how_its_modules_are_called(tmp_path):
    names = {"phi3": ModuleNaming(is_fused=True), "gemma3_vl": COMPOSED, "qwen3": ModuleNaming()}
    for family, naming in names.items():
        folder = rm.make_config(tmp_path / family, family, quantization_config=FP8)
        if family == "gemma3_vl":
            content = json.loads((folder / "config.json").read_text())
            content["quantization_config"] = content["text_config"].pop("quantization_config")
            (folder / "config.json").write_text(json.dumps(content))
        assert ModelConfig.from_path(str(folder)).quantization_config.naming == naming
    rm.write_pooling(folder)
    assert ModelConfig.from_path(str(folder)).quantization_config.naming == ModuleNaming(prefixes=("model.", ""))


def test_modules_that_gptqs_tools_leave_out():
    left_out = read(GPTQ | {"dynamic": {r"-:.*\.mlp\.gate_.*": {}}})
    assert left_out.is_ignored(NAME) and not left_out.is_ignored("model.layers.1.mlp.up_proj")
    listed = read(GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.gate_proj"]]})
    assert not listed.is_ignored(NAME) and listed.is_ignored("model.layers.1.mlp.up_proj")


def test_awqs_lists_may_name_modules_in_the_middle():
    config = read(AWQ | {"modules_to_not_convert": ["mlp", "visual"]})
    assert config.is_ignored(NAME) and config.is_ignored("mlp.x") and not config.is_ignored("model.layers.1.mlps.x")
    config = read(AWQ | {"modules_to_not_convert": [".layers.1.", "mlp.gate."]})
    assert config.is_ignored(NAME) and not config.is_ignored("model.layers.11.mlp.gate_proj")


def test_weights_alone_may_be_nvfp4():
    config = read(None, {"quantization": {"quant_algo": "W4A16_NVFP4", "group_size": 16}})
    assert config.format == read(None, MODELOPT_FP4).format
