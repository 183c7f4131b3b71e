"""Owns the registry entries of families with linear layers beside full attention."""

from ramet.srt.configs.dense_families import PLAIN
from ramet.srt.configs.harmless_keys import ANY
from ramet.srt.configs.model_family import ExpertTraits, ModelFamily

_HYBRID = {  # what they have in common
    **PLAIN,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
    "attention_bias": False,
    "layer_types": None,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_EXPERTS = {
    "hidden_size": 2048,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_QWEN3_NEXT = {
    **_HYBRID,
    **_EXPERTS,
    "vocab_size": 151936,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "decoder_sparse_step": 1,
    "num_experts_per_tok": 10,
    "num_experts": 512,
    "norm_topk_prob": True,
    "mlp_only_layers": None,
}
_QWEN3_5 = {**_HYBRID, "vocab_size": 248320, "intermediate_size": 12288, "num_key_value_heads": 4}
_QWEN3_5_MOE = {
    **{name: value for name, value in _HYBRID.items() if name != "intermediate_size"},
    **_EXPERTS,
    "vocab_size": 248320,
    "num_hidden_layers": 40,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}
_MROPE = ("mrope_section", "mrope_interleaved")  # where the axes of pictures turn: all are equal in text
# What the published files of Qwen3.5 say of every model of the family.
_SAID = {
    "attn_output_gate": (True,),
    "mamba_ssm_dtype": ("float32",),
    "mtp_num_hidden_layers": ANY,  # of layers that draft tokens, as is the next
    "mtp_use_dedicated_embeddings": ANY,
}
MTP = r"mtp\."  # layers that draft tokens
_SHARED = ExpertTraits(shared="shared_expert", shared_gate="shared_expert_gate")

QWEN3_5 = ModelFamily(
    architecture="Qwen3_5ForCausalLM",
    model_type="qwen3_5_text",
    defaults=_QWEN3_5,
    null_means={"layer_types": None},
    harmless=_SAID,
    norm_offset=1.0,
    qk_norm="head",
    has_output_gate=True,
    rope_extras=_MROPE,
    surplus=MTP,
)
QWEN3_5_MOE = ModelFamily(
    architecture="Qwen3_5MoeForCausalLM",
    model_type="qwen3_5_moe_text",
    defaults=_QWEN3_5_MOE,
    null_means={"layer_types": None},
    harmless={**_SAID, "intermediate_size": ANY, "norm_topk_prob": (True, None)},  # no layer has a plain MLP
    norm_offset=1.0,
    qk_norm="head",
    has_output_gate=True,
    rope_extras=_MROPE,
    surplus=MTP,
    experts=ExpertTraits(shared="shared_expert", shared_gate="shared_expert_gate", always_normalised=True),
)
HYBRID_FAMILIES = (
    ModelFamily(
        architecture="Qwen3NextForCausalLM",
        model_type="qwen3_next",
        defaults=_QWEN3_NEXT,
        null_means={"layer_types": None, "mlp_only_layers": None},
        norm_offset=1.0,
        qk_norm="head",
        has_output_gate=True,
        delta_by_key_head=True,
        surplus=MTP,
        experts=_SHARED,
    ),
    QWEN3_5,
    QWEN3_5_MOE,
)
