"""Owns the registry entries of dense families."""

from collections.abc import Mapping
from typing import Any

from ramet.srt.configs.harmless_keys import ANY
from ramet.srt.configs.model_family import ModelFamily

LLAMA: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
}
# What every family has, whatever else: the keys are Llama's but for its biases.
PLAIN = {name: value for name, value in LLAMA.items() if name not in ("attention_bias", "mlp_bias")}
MISTRAL = {
    **PLAIN,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "layer_types": None,
}
_MINISTRAL3 = {
    **{name: value for name, value in MISTRAL.items() if name != "layer_types"},
    "vocab_size": 131072,
    "num_hidden_layers": 34,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
QWEN2 = {
    **PLAIN,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
QWEN3 = {**QWEN2, "head_dim": 128, "attention_bias": False}
_PHI3 = {
    **PLAIN,
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
}
_GRANITE = {
    **LLAMA,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}
_OLMO2 = {**PLAIN, "vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False}
_OLMO3 = {**_OLMO2, "rope_theta": 500000.0, "sliding_window": 4096, "layer_types": None}
_SMOLLM3 = {
    **LLAMA,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_theta": 2000000.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
}
_SEED_OSS = {
    **LLAMA,
    "vocab_size": 155136,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "attention_bias": True,
    "attention_out_bias": False,
}
_GEMMA3 = {
    **{name: value for name, value in PLAIN.items() if name != "hidden_act"},
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "layer_types": None,
    "final_logit_softcapping": None,
}
_GEMMA2 = {
    **{
        name: value for name, value in _GEMMA3.items() if name not in ("rope_local_base_freq", "sliding_window_pattern")
    },
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}

DENSE_FAMILIES = (
    ModelFamily(
        architecture="LlamaForCausalLM",
        model_type="llama",
        defaults=LLAMA,
        null_means={"num_key_value_heads": None, "head_dim": None},
    ),
    ModelFamily(
        architecture="MistralForCausalLM",
        model_type="mistral",
        defaults=MISTRAL,
        null_means={"head_dim": None, "sliding_window": None, "layer_types": None},
    ),
    ModelFamily(
        architecture="Ministral3ForCausalLM",
        model_type="ministral3",
        defaults=_MINISTRAL3,
        null_means={"sliding_window": None},
        scales_queries=True,
        rope_extras=("llama_4_scaling_beta", "max_position_embeddings"),
    ),
    ModelFamily(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        defaults=QWEN2,
        null_means={"num_key_value_heads": None, "sliding_window": None, "layer_types": None},
        always_qkv_bias=True,
        harmless={"attention_bias": ANY, "qkv_bias": (True, None)},
    ),
    ModelFamily(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        defaults=QWEN3,
        null_means={"num_key_value_heads": None, "sliding_window": None, "layer_types": None},
        harmless={"use_qk_norm": (True, None)},
        qk_norm="head",
    ),
    ModelFamily(
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        defaults=_PHI3,
        null_means={"num_key_value_heads": None, "sliding_window": None},
        harmless={"full_attn_mod": (1,), "interpolate_factor": (1,), "lm_head_bias": (False,)},  # Phi-4-mini has them
        is_fused=True,
        rope_types={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
    ),
    ModelFamily(
        architecture="GraniteForCausalLM",
        model_type="granite",
        defaults=_GRANITE,
        null_means={"num_key_value_heads": None},
    ),
    ModelFamily(
        architecture="Olmo2ForCausalLM",
        model_type="olmo2",
        defaults=_OLMO2,
        null_means={"num_key_value_heads": None},
        qk_norm="all",
        norms="after",
    ),
    ModelFamily(
        architecture="Olmo3ForCausalLM",
        model_type="olmo3",
        defaults=_OLMO3,
        null_means={"num_key_value_heads": None, "layer_types": None},
        qk_norm="all",
        norms="after",
        window_rule="but every fourth",
        has_rope_by_layer_type=True,
    ),
    ModelFamily(
        architecture="SmolLM3ForCausalLM",
        model_type="smollm3",
        defaults=_SMOLLM3,
        null_means={"num_key_value_heads": None, "sliding_window": None, "layer_types": None, "no_rope_layers": None},
        window_rule="without rotation",
    ),
    ModelFamily(
        architecture="SeedOssForCausalLM",
        model_type="seed_oss",
        defaults=_SEED_OSS,
        null_means={"num_key_value_heads": None, "head_dim": None},
        o_bias_key="attention_out_bias",
    ),
    ModelFamily(
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        defaults=_GEMMA2,
        null_means={"layer_types": None, "final_logit_softcapping": None, "attn_logit_softcapping": None},
        harmless={
            "hidden_act": ("gelu_pytorch_tanh", None),
            "use_bidirectional_attention": (False, None),
            "cache_implementation": ANY,
            "sliding_window_size": ANY,  # as `sliding_window`
        },
        hidden_act_key="hidden_activation",
        norms="both",
        norm_offset=1.0,
        window_rule="every other",
        scales_embedding=True,
    ),
    ModelFamily(
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        defaults=_GEMMA3,
        null_means={"layer_types": None, "final_logit_softcapping": None},
        harmless={
            "hidden_act": ("gelu_pytorch_tanh", None),
            "use_bidirectional_attention": (False, None),
            "_sliding_window_pattern": ANY,
            "cache_implementation": ANY,
        },
        hidden_act_key="hidden_activation",
        qk_norm="head",
        norms="both",
        norm_offset=1.0,
        window_rule="but every so many",
        has_rope_by_layer_type=True,
        scales_embedding=True,
    ),
)
