"""Owns what Ramet lacks for a config whose architecture it doesn't know, as far as the config's keys tell."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ramet.srt.configs.harmless_keys import HARMLESS_KEYS, SHOWN, objections, short
from ramet.srt.configs.model_family import HIDDEN_ACTS, ModelFamily

# Traits by the keys that ask for them, unless they are null, false, zero or empty.
_LACKING: dict[str, tuple[str, ...]] = {
    "other linear attention than gated delta nets": ("linear_attn_config",),
    "state space layers": (
        "ssm_state_size",
        "mamba_d_state",
        "mamba_num_heads",
        "hybrid_override_pattern",
        "conv_kernel",
    ),
    "attention in chunks": ("attention_chunk_size",),
    "clamped gates of experts": ("swiglu_limit",),
    "keys shared between layers": ("num_kv_shared_layers",),
    "clipped queries, keys and values": ("clip_qkv",),
    "layer norms": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention and MLP side by side": ("use_parallel_residual", "parallel_attn"),
    "an encoder": ("is_encoder_decoder", "add_cross_attention"),
    "positions by a bias": ("alibi", "position_embedding_type"),
}
_LAYER_TYPES = ("full_attention", "attention", "sliding_attention", "linear_attention")
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "architectures", "model_type")


def missing_traits(config: Mapping[str, Any], families: Iterable[ModelFamily]) -> str:
    """A sentence on what Ramet lacks, to stand behind an error; "" where the keys tell of nothing."""
    lacking = list(_lacking(config))
    unknown = _unknown_keys(config, families)
    parts = []
    if lacking:
        parts.append(f"of what its config asks for, Ramet lacks {'; '.join(lacking)}")
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        parts.append(f"no family here has the keys {', '.join(unknown[:SHOWN])}{more}")
    if not parts:
        return "all keys of its config are known, so an entry may be all that it takes (docs/models.md)"
    return "; ".join(parts)


def _lacking(config: Mapping[str, Any]) -> Iterator[str]:
    for trait, keys in _LACKING.items():
        if found := [key for key in keys if config.get(key)]:
            yield f"{trait} ({', '.join(map(repr, found))})"
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and (others := sorted({short(kind) for kind in kinds if kind not in _LAYER_TYPES})):
        yield f"layers of type {', '.join(others)}"
    act = config.get("hidden_act", config.get("hidden_activation"))
    if act is not None and act not in HIDDEN_ACTS:
        yield f"the activation {short(act)}"


def _unknown_keys(config: Mapping[str, Any], families: Iterable[ModelFamily]) -> list[str]:
    known = {*HARMLESS_KEYS, *_ROPE_KEYS, *(key for keys in _LACKING.values() for key in keys)}
    for family in families:
        known |= {*family.defaults, *family.harmless}
    unread = {key: value for key, value in config.items() if key not in known and value is not False}
    return [short(key) for key in unread if objections({key: unread[key]}, {})]
