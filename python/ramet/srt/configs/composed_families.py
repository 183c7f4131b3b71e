"""Owns the registry entries of models that are composed of several, of which Ramet runs the one for text."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ramet.srt.configs.dense_families import DENSE_FAMILIES, PLAIN
from ramet.srt.configs.harmless_keys import ANY
from ramet.srt.configs.hybrid_families import MTP, QWEN3_5, QWEN3_5_MOE
from ramet.srt.configs.model_family import ExpertTraits, ModelFamily

OTHER_PARTS = r"(model\.)?(visual|vision_tower|multi_modal_projector)\."
TEXT = "text_config"  # the key of the text model's config
# Of the text model's modules: since transformers 4.52, and before.
PREFIXES = ("model.language_model.", "language_model.model.")
# Keys of the whole that mean more than the text model's own.
OF_THE_WHOLE = ("dtype", "torch_dtype", "quantization_config", "compression_config", "transformers_version")
# What the text model's config has in vain: the whole's counts, or none.
_WITHOUT_EFFECT = ("architectures", "model_type", "tie_word_embeddings")
_TEXTS = {family.model_type: family for family in DENSE_FAMILIES}
_QWEN3_VL = {
    **PLAIN,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
    "attention_bias": False,
}
_QWEN3_VL_MOE = {
    **_QWEN3_VL,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": None,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "mlp_only_layers": None,
}
_MROPE = ("mrope_section", "mrope_interleaved")  # where the axes of pictures turn: all are equal in text
_PICTURE_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True, kw_only=True)
class ComposedFamily:
    """One architecture that has other parts beside a text model: which text models, and what may be ignored."""

    architecture: str
    model_type: str
    texts: Mapping[str, ModelFamily]  # by their model type
    is_tied: bool  # when the config of the whole doesn't say
    surplus: str = OTHER_PARTS  # of the files; a regular expression
    harmless: Mapping[str, Any] = field(default_factory=dict)

    def text(self, config: Mapping[str, Any], file: str) -> tuple[ModelFamily, dict[str, Any]]:
        """The text model's family and config, as if it were by itself.

        Raises:
            ValueError: if there is none, or one of another kind.
        """
        text = config.get(TEXT)
        if not isinstance(text, dict):
            raise ValueError(f"{file}: {TEXT!r} of architecture {self.architecture!r} must be an object; got {text!r}")
        if text.get("model_type") not in self.texts:
            known = " or ".join(map(repr, self.texts))
            raise ValueError(
                f"{file}: 'model_type' in {TEXT!r} of architecture {self.architecture!r} must be {known}; "
                f"got {text.get('model_type')!r}"
            )
        family = self.texts[text["model_type"]]
        flat = {key: value for key, value in text.items() if key not in _WITHOUT_EFFECT}
        flat |= {key: value for key, value in config.items() if key not in text or key in OF_THE_WHOLE}
        flat["tie_word_embeddings"] = config.get("tie_word_embeddings", self.is_tied)
        flat["eos_token_id"] = _together(config.get("eos_token_id"), text.get("eos_token_id"))
        family = replace(
            family,
            architecture=self.architecture,
            harmless={TEXT: ANY, "vision_config": ANY, **family.harmless, **self.harmless},
            prefixes=PREFIXES,
            surplus=self.surplus,
        )
        return family, flat


def _together(whole: Any, text: Any) -> list[Any]:
    ids = [one if isinstance(one, list) else [one] for one in (whole, text) if one is not None]
    return [token_id for part in ids for token_id in part]


def _without(family: ModelFamily, key: str) -> ModelFamily:
    """A family whose class doesn't have a key."""
    defaults, null_means = ({k: v for k, v in one.items() if k != key} for one in (family.defaults, family.null_means))
    return replace(family, defaults=defaults, null_means=null_means)


COMPOSED_FAMILIES = (
    ComposedFamily(
        architecture="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        texts={"gemma3_text": _without(_TEXTS["gemma3_text"], "final_logit_softcapping")},  # its class ignores it
        is_tied=True,
        harmless=dict.fromkeys(
            ("image_token_index", "boi_token_index", "eoi_token_index", "mm_tokens_per_image", "image_token_id",
             "boi_token_id", "eoi_token_id"), ANY,
        ),
    ),
    ComposedFamily(
        architecture="Mistral3ForConditionalGeneration",
        model_type="mistral3",
        texts={kind: _TEXTS[kind] for kind in ("mistral", "ministral3")},
        is_tied=True,
        harmless=dict.fromkeys(
            ("image_token_index", "image_token_id", "projector_hidden_act", "vision_feature_layer",
             "multimodal_projector_bias", "spatial_merge_size"), ANY,
        ),
    ),
    ComposedFamily(
        architecture="Qwen3VLForConditionalGeneration",
        model_type="qwen3_vl",
        texts={
            "qwen3_vl_text": ModelFamily(
                architecture="",
                model_type="qwen3_vl_text",
                defaults=_QWEN3_VL,
                null_means={"num_key_value_heads": None},
                qk_norm="head",
                rope_extras=_MROPE,
            )
        },
        is_tied=False,
        harmless=dict.fromkeys(_PICTURE_TOKENS, ANY),
    ),
    ComposedFamily(
        architecture="Qwen3VLMoeForConditionalGeneration",
        model_type="qwen3_vl_moe",
        texts={
            "qwen3_vl_moe_text": ModelFamily(
                architecture="",
                model_type="qwen3_vl_moe_text",
                defaults=_QWEN3_VL_MOE,
                null_means={"head_dim": None, "mlp_only_layers": None},
                harmless={"norm_topk_prob": (True, None)},
                qk_norm="head",
                rope_extras=_MROPE,
                experts=ExpertTraits(always_normalised=True),
            )
        },
        is_tied=False,
        harmless=dict.fromkeys(_PICTURE_TOKENS, ANY),
    ),
    ComposedFamily(
        architecture="Qwen3_5ForConditionalGeneration",
        model_type="qwen3_5",
        texts={"qwen3_5_text": QWEN3_5},
        is_tied=False,
        surplus=rf"{OTHER_PARTS}|{MTP}",
        harmless=dict.fromkeys(_PICTURE_TOKENS, ANY),
    ),
    ComposedFamily(
        architecture="Qwen3_5MoeForConditionalGeneration",
        model_type="qwen3_5_moe",
        texts={"qwen3_5_moe_text": QWEN3_5_MOE},
        is_tied=False,
        surplus=rf"{OTHER_PARTS}|{MTP}",
        harmless=dict.fromkeys(_PICTURE_TOKENS, ANY),
    ),
)  # fmt: skip
