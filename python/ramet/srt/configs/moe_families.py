"""Owns the registry entries of families with experts."""

from ramet.srt.configs.dense_families import MISTRAL, QWEN2, QWEN3
from ramet.srt.configs.model_family import ExpertTraits, ModelFamily

_MIXTRAL = {
    **{name: value for name, value in MISTRAL.items() if name != "layer_types"},
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_experts": 8,
}
_QWEN2_MOE = {
    **QWEN2,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
}
_QWEN3_MOE = {
    **{name: value for name, value in QWEN3.items() if name not in ("max_window_layers", "layer_types")},
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "head_dim": None,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
}

MOE_FAMILIES = (
    ModelFamily(
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        defaults=_MIXTRAL,
        null_means={"head_dim": None, "sliding_window": None},
        harmless={"norm_topk_prob": (True, None)},
        experts=ExpertTraits(block="block_sparse_moe", names=("w1", "w3", "w2"), always_normalised=True),
    ),
    ModelFamily(
        architecture="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        defaults=_QWEN2_MOE,
        null_means={"sliding_window": None, "layer_types": None, "mlp_only_layers": None},
        window_rule="every other below",
        experts=ExpertTraits(shared="shared_expert", shared_gate="shared_expert_gate"),
    ),
    ModelFamily(
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        defaults=_QWEN3_MOE,
        null_means={
            "sliding_window": None,
            "mlp_only_layers": None,
            "decoder_sparse_step": 1,
            "norm_topk_prob": False,
        },
        harmless={"use_qk_norm": (True, None)},
        qk_norm="head",
    ),
)
