"""Owns the registry of model families, and which of them a config belongs to.

An entry has the keys of a family's config with their published defaults, and the traits that no key gives. The defaults
are what transformers' config class of the `model_type` takes for a key that the file doesn't have.
"""

from collections.abc import Mapping
from typing import Any

from ramet.srt.configs.composed_families import COMPOSED_FAMILIES, ComposedFamily
from ramet.srt.configs.dense_families import DENSE_FAMILIES
from ramet.srt.configs.hybrid_families import HYBRID_FAMILIES
from ramet.srt.configs.missing_traits import missing_traits
from ramet.srt.configs.model_family import ModelFamily
from ramet.srt.configs.moe_families import MOE_FAMILIES

FAMILIES: dict[str, ModelFamily | ComposedFamily] = {
    family.architecture: family for family in (*DENSE_FAMILIES, *MOE_FAMILIES, *HYBRID_FAMILIES, *COMPOSED_FAMILIES)
}

# Keys under which multimodal and other composed configs hold the configs of their parts.
_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "vision_config", "audio_config")
_PARTS_WITH_TEXT = frozenset({"text_config", "llm_config", "language_config"})


def find_family(config: dict[str, Any], file: str) -> tuple[ModelFamily, dict[str, Any]]:
    """The family of the architecture that `config` names. Asked first: nothing else means anything without it.

    Returns:
        The family, and its config: of a composed model, those of the text model.

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
            f"supported are {', '.join(sorted(FAMILIES))}; {_missing(config)}"
        )
    model_types = (family.model_type, *(family.other_model_types if isinstance(family, ModelFamily) else ()))
    if config.get("model_type") not in model_types:
        raise ValueError(
            f"{file}: 'model_type' of architecture {family.architecture!r} must be "
            f"{' or '.join(map(repr, model_types))}; "
            f"got {config.get('model_type')!r}"
        )
    return family.text(config, file) if isinstance(family, ComposedFamily) else (family, config)


def _missing(config: Mapping[str, Any]) -> str:
    """What Ramet lacks for it: of one that is composed, for its text model."""
    text = next(
        (config[key] for key in _PARTS if key in _PARTS_WITH_TEXT and isinstance(config.get(key), dict)), config
    )
    return missing_traits(text, (family for family in FAMILIES.values() if isinstance(family, ModelFamily)))


def _composition(config: Mapping[str, Any], architecture: str = "") -> str:
    """What to add to an error about the architecture if the config is one of several parts."""
    parts = [name for name in _PARTS if isinstance(config.get(name), dict)]
    if not parts:
        return ""
    several = architecture.endswith("ForConditionalGeneration") or not _PARTS_WITH_TEXT.issuperset(parts)
    kind = "multimodal" if several else "nested"
    return f" (a {kind} config, whose parts lie in {', '.join(repr(name) for name in parts)})"
