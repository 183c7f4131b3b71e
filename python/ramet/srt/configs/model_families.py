"""Owns what is published of each model family: its config's keys with their defaults, and the traits that no key gives.

The defaults are what transformers' config class of the `model_type` takes for a key that the file doesn't have.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ramet.srt.configs.harmless_keys import ANY


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """One architecture: which keys its computation depends on, and what they are when the file lacks them."""

    architecture: str
    model_type: str
    defaults: Mapping[str, Any]  # None stands for "derived from other keys" or "none"
    null_means: Mapping[str, Any]  # what null stands for, in the keys of `defaults` that may be null
    always_qkv_bias: bool = False  # biases on q, k and v whatever the config says
    # What keys outside of `defaults` may hold; goes before HARMLESS_KEYS.
    harmless: Mapping[str, Any] = field(default_factory=dict)


_LLAMA = {
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
_MISTRAL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "layer_types": None,
}
_MIXTRAL = {
    **{name: value for name, value in _MISTRAL.items() if name != "layer_types"},
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_experts": 8,
}
_QWEN2 = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_QWEN3 = {**_QWEN2, "head_dim": 128, "attention_bias": False}
_QWEN3_MOE = {
    **{name: value for name, value in _QWEN3.items() if name not in ("max_window_layers", "layer_types")},
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

FAMILIES: dict[str, ModelFamily] = {
    family.architecture: family
    for family in (
        ModelFamily(
            architecture="LlamaForCausalLM",
            model_type="llama",
            defaults=_LLAMA,
            null_means={"num_key_value_heads": None, "head_dim": None},
        ),
        ModelFamily(
            architecture="MistralForCausalLM",
            model_type="mistral",
            defaults=_MISTRAL,
            null_means={"head_dim": None, "sliding_window": None, "layer_types": None},
        ),
        ModelFamily(
            architecture="MixtralForCausalLM",
            model_type="mixtral",
            defaults=_MIXTRAL,
            null_means={"head_dim": None, "sliding_window": None},
            harmless={"norm_topk_prob": (True, None)},
        ),
        ModelFamily(
            architecture="Qwen2ForCausalLM",
            model_type="qwen2",
            defaults=_QWEN2,
            null_means={"num_key_value_heads": None, "sliding_window": None, "layer_types": None},
            always_qkv_bias=True,
            harmless={"attention_bias": ANY, "qkv_bias": (True, None)},
        ),
        ModelFamily(
            architecture="Qwen3ForCausalLM",
            model_type="qwen3",
            defaults=_QWEN3,
            null_means={"num_key_value_heads": None, "sliding_window": None, "layer_types": None},
            harmless={"use_qk_norm": (True, None)},
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
        ),
    )
}

# Keys under which multimodal and other composed configs hold the configs of their parts.
_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "vision_config", "audio_config")
_PARTS_WITH_TEXT = frozenset({"text_config", "llm_config", "language_config"})


def find_family(config: Mapping[str, Any], file: str) -> ModelFamily:
    """The family of the architecture that `config` names. Asked first: nothing else means anything without it.

    Raises:
        ValueError: if no architecture is named, or several, or one that isn't supported, or another's model type.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{file}: 'architectures' must name the model's class in a list; got {names!r}{_composition(config)}"
        )
    if len(set(names)) > 1:
        raise ValueError(
            f"{file}: 'architectures' names several classes ({', '.join(names)}), which compute different things; "
            "leave the one that the weights belong to"
        )
    family = FAMILIES.get(names[0])
    if family is None:
        raise ValueError(
            f"{file}: architecture {names[0]!r}{_composition(config, names[0])} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    if config.get("model_type") != family.model_type:
        raise ValueError(
            f"{file}: 'model_type' of architecture {family.architecture!r} must be {family.model_type!r}; "
            f"got {config.get('model_type')!r}"
        )
    return family


def _composition(config: Mapping[str, Any], architecture: str = "") -> str:
    """What to add to an error about the architecture if the config is one of several parts."""
    parts = [name for name in _PARTS if isinstance(config.get(name), dict)]
    if not parts:
        return ""
    several = architecture.endswith("ForConditionalGeneration") or not _PARTS_WITH_TEXT.issuperset(parts)
    kind = "multimodal" if several else "nested"
    return f" (a {kind} config, whose parts lie in {', '.join(repr(name) for name in parts)})"
