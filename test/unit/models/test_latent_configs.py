"""Owns the test that published configs of models with latent attention are read, split and laid out as they are."""

import json
from typing import Any

import pytest
import sharded_models as sm
import torch
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.configs.parallel_config import check_parallel_sizes
from ramet.srt.layers.attention.registry import describe_attention, describe_kv_cache

YARN = {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }, "rms_norm_eps": 1e-06, "rope_scaling": {**YARN, "beta_fast": 32, "beta_slow": 1, "factor": 40},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
KIMI_K2: dict[str, Any] = DEEPSEEK_V3 | {
    "model_type": "kimi_k2", "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585,
    "first_k_dense_replace": 1, "max_position_embeddings": 131072, "n_group": 1, "n_routed_experts": 384,
    "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "pretraining_tp": 1,
    "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0}, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827, "seq_aux": True, "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip
GLM_4_7_FLASH: dict[str, Any] = {
    "architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "pad_token_id": 154820, "eos_token_id": [154820, 154827, 154829], "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 10240, "max_position_embeddings": 202752, "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536, "topk_method": "noaux_tc", "norm_topk_prob": True, "num_attention_heads": 20,
    "n_group": 1, "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 1, "routed_scaling_factor": 1.8,
    "num_experts_per_tok": 4, "first_k_dense_replace": 1, "num_hidden_layers": 47, "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 1000000, "tie_word_embeddings": False, "dtype": "bfloat16", "transformers_version": "5.0.0rc0",
    "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
    "vocab_size": 154880,
}  # fmt: skip
DEEPSEEK_V3_2: dict[str, Any] = {name: value for name, value in DEEPSEEK_V3.items() if name != "auto_map"} | {
    "architectures": ["DeepseekV32ForCausalLM"], "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
    "model_type": "deepseek_v32", "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }, "transformers_version": "4.44.2",
}  # fmt: skip
GLM_5: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "dtype": "bfloat16", "eos_token_id": [154820, 154827, 154829], "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "head_dim": 64, "hidden_size": 6144, "index_head_dim": 128, "index_n_heads": 32,
    "index_topk": 2048, "indexer_rope_interleave": True, "initializer_range": 0.02, "intermediate_size": 12288,
    "kv_lora_rank": 512, "max_position_embeddings": 202752, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "model_type": "glm_moe_dsa", "n_group": 1, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 78, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 1, "pad_token_id": 154820, "pretraining_tp": 1, "q_lora_rank": 2048,
    "qk_head_dim": 256, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05,
    "rope_interleave": True, "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 1,
    "topk_method": "noaux_tc", "transformers_version": "5.0.2.dev0", "use_cache": True, "v_head_dim": 256,
    "vocab_size": 154880,
}  # fmt: skip
GLM_5_2: dict[str, Any] = GLM_5 | {
    "index_share_for_mtp_iteration": True, "index_skip_topk_offset": 3, "index_topk_freq": 4,
    "index_topk_pattern": None, "indexer_types": [
        "full" if layer < 3 or layer % 4 == 2 else "shared" for layer in range(78)
    ], "max_position_embeddings": 1048576, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
}  # fmt: skip
PUBLISHED = {  # config, tp and ep sizes that divide it, GB of one rank's weights, columns of a head's queries
    "DeepSeek-V3": (DEEPSEEK_V3, 8, 8, 86.0, 192),
    "Kimi-K2": (KIMI_K2, 16, 16, 66.0, 192),
    "GLM-4.7-Flash": (GLM_4_7_FLASH, 2, 2, 30.0, 256),
    "DeepSeek-V3.2": (DEEPSEEK_V3_2, 8, 8, 86.9, 192),
    "GLM-5": (GLM_5, 8, 8, 188.0, 256),
    "GLM-5.2": (GLM_5_2, 8, 8, 187.0, 256),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_split_and_laid_out(tmp_path, name):
    given, tp_size, ep_size, gigabytes, query_dim = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(given))
    config = ModelConfig.from_path(str(tmp_path))
    latent, moe = config.traits.latent, config.moe
    assert (latent.kv_rank, latent.rope_dim, latent.query_dim, latent.is_interleaved) == (512, 64, query_dim, True)
    factor = given["rope_scaling"]["factor"] if given.get("rope_scaling") else 1
    assert config.context_len == (4096 * factor if factor > 1 else given["max_position_embeddings"])
    assert (config.traits.attention_scale > query_dim**-0.5) == (factor > 1)
    assert sum(moe.sparse_layers) == config.num_hidden_layers - given["first_k_dense_replace"]
    assert bool(config.surplus_tensors) == (given["num_nextn_predict_layers"] > 0)
    check_parallel_sizes(config, tp_size=tp_size, pp_size=1, ep_size=ep_size, attn_dp_size=tp_size)
    rank = sm.build_model(tmp_path, sm.all_ranks(tp_size, ep_size)[1])
    assert sm.make_manifest(rank).arena_nbytes / 1e9 == pytest.approx(gigabytes, rel=0.02)
    spec = describe_attention(rank, torch.device("cpu"), torch.bfloat16, torch.bfloat16, 64)
    assert spec.num_heads == given["num_attention_heads"] // tp_size and spec.kv.row_sizes == (576,)
    kept = describe_kv_cache(rank, torch.bfloat16, may_differ=False)
    num_indices = sum(layer.owns_index for layer in config.layers)
    assert num_indices == {"DeepSeek-V3.2": 61, "GLM-5": 78, "GLM-5.2": 21}.get(name, 0)
    assert kept.page_bytes(1, frozenset()) == (1152 * config.num_hidden_layers + 256 * num_indices, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_rope_head_dim": 63}, "'qk_rope_head_dim' must be an even number; got 63"),
        ({"num_key_value_heads": 64}, r"'num_key_value_heads' must be num_attention_heads \(128\); got 64"),
        ({"head_dim": 192}, "'head_dim' must be 64, which follows from the other sizes; got 192"),
        ({"scoring_func": "softmax"}, "'scoring_func' is supported only as \"sigmoid\"; got 'softmax'"),
        ({"topk_method": "group_limited_greedy"}, "'topk_method' is supported only as \"noaux_tc\""),
        ({"index_topk": 2048}, r"'index_topk' \(2048\): not known for this architecture"),
        ({"model_type": "deepseek_v2"}, "must be 'deepseek_v3' or 'kimi_k2'; got 'deepseek_v2'"),
    ],
)
def test_what_latent_attention_does_not_have_is_refused_by_name(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3 | change))
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_path(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_topk": 0}, "'index_topk' must be a positive integer; got 0"),
        ({"index_head_dim": 63}, r"'index_head_dim' must be at least 'qk_rope_head_dim' \(64\); got 63"),
        ({"q_lora_rank": None}, "'q_lora_rank' must be a positive integer"),
        ({"indexer_types": ["shared"] * 78}, "'indexer_types' must give full or shared for each layer, and full for"),
        ({"indexer_types": ["full"] * 77}, "'indexer_types' must give full or shared for each layer"),
        ({"index_topk_pattern": "FX" * 39}, "'index_topk_pattern' must give full or shared for each layer"),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 0}, "'index_skip_topk_offset' must leave the first layer"),
        ({"index_topk_freq": 0}, "'index_topk_freq' must be a positive integer; got 0"),
        ({"indexer_rope_interleave": False}, "'indexer_rope_interleave' is supported only as true or null"),
        ({"rope_interleave": False}, "'rope_interleave' is supported only as true or null; got False"),
        ({"layer_types": ["full_attention"] * 78}, "'layer_types' must give indexed_attention for each layer"),
        ({"index_kpool": 4}, r"'index_kpool' \(4\): not known for this architecture"),
    ],
)
def test_what_an_index_does_not_have_is_refused_by_name(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(GLM_5 | change))
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_path(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "owners"),
    [
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, "FFFSSSFSSS"),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, "FSFSFSFSFS"),
        ({"index_topk_pattern": "FSSFFSSFFSS"}, "FSSFFSSFFS"),
        ({"index_topk_pattern": "F" * 10, "indexer_types": ["full", "shared"] * 5}, "FSFSFSFSFS"),
    ],
)
def test_which_layers_have_an_index(tmp_path, change, owners):
    sizes = {"num_hidden_layers": 10, "first_k_dense_replace": 3}
    (tmp_path / "config.json").write_text(json.dumps(GLM_5 | sizes | change))
    layers = ModelConfig.from_path(str(tmp_path)).layers
    assert "".join("F" if layer.owns_index else "S" for layer in layers) == owners


def test_an_older_key_for_dense_layers_must_fit_the_newer_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GLM_4_7_FLASH | {"first_k_dense_replace": 2}))
    with pytest.raises(ValueError, match=r"'first_k_dense_replace' must fit .* layers \[0\] are dense; got 2"):
        ModelConfig.from_path(str(tmp_path))
