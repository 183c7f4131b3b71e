"""Owns what a config says of each decoder layer, and of all of them together. No torch."""

from dataclasses import dataclass

from ramet.srt.configs.config_reader import ConfigReader
from ramet.srt.configs.delta_config import DeltaTraits
from ramet.srt.configs.index_config import INDEXED, read_index_owners
from ramet.srt.configs.latent_config import LatentTraits
from ramet.srt.configs.model_family import HIDDEN_ACTS, NormPlacement, QkNorm
from ramet.srt.configs.moe_config import MoeConfig
from ramet.srt.configs.rope_config import FULL, SLIDING, RopeConfig

WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
LINEAR = "linear_attention"
KINDS = {FULL: FULL, "attention": FULL, SLIDING: SLIDING}


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer."""

    window: int | None  # sliding window in tokens; None for full attention
    rope: RopeConfig | None  # None: no positions
    has_experts: bool  # in place of the MLP
    owns_index: bool = False  # of a model with a sparse index: whether this layer has its own
    is_linear: bool = False  # a gated delta net in place of attention


@dataclass(frozen=True, kw_only=True)
class DecoderTraits:
    """What the layers have in common, beside their sizes."""

    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    hidden_act: str
    rms_norm_eps: float
    norms: NormPlacement  # of attention and MLP
    norm_offset: float  # added to each norm's weight
    qk_norm: QkNorm  # "" for none
    latent: LatentTraits | None  # None: each layer has keys and values of its heads
    delta: DeltaTraits | None  # of the linear layers; None: there are none
    has_output_gate: bool  # of attention: a sigmoid for each column of its output
    attention_scale: float  # of the products of queries and keys
    attention_soft_cap: float | None  # the bound of those products, which tanh keeps
    has_sinks: bool  # a logit for each head in the softmax of its attention, whose weight goes to nothing
    embedding_multiplier: float
    rounds_embedding_multiplier: bool  # to the model's type
    residual_multiplier: float  # of what attention and MLP give
    logits_divisor: float
    logits_soft_cap: float | None  # their bound, which tanh keeps


def read_layers(
    need: ConfigReader, num_layers: int, ropes: dict[str, RopeConfig], moe: MoeConfig | None
) -> tuple[LayerSpec, ...]:
    """Each layer's own.

    Args:
        ropes: by layer type.

    Raises:
        ValueError: if a value is wrong; the message names it.
    """
    if need.has("attn_type_list") and need.value("attn_type_list") not in (None, [1] * num_layers):
        raise need.wrong(
            "attn_type_list", "must have a 1, for full attention, for each layer", need.value("attn_type_list")
        )
    is_linear = _linear_layers(need, num_layers)
    rotates = _rotates(need, num_layers)
    windows = _windows(need, num_layers, rotates)
    kinds = [FULL if window is None else SLIDING for window in windows]
    owners = read_index_owners(need, num_layers)
    return tuple(
        LayerSpec(
            window=windows[index],
            rope=ropes[kinds[index]] if rotates[index] and not is_linear[index] else None,
            has_experts=moe is not None and moe.sparse_layers[index],
            owns_index=owners[index],
            is_linear=is_linear[index],
        )
        for index in range(num_layers)
    )


def read_traits(
    need: ConfigReader,
    head_dim: int,
    latent: LatentTraits | None,
    full_rope: RopeConfig,
    delta: DeltaTraits | None = None,
) -> DecoderTraits:
    """What all layers have.

    Args:
        full_rope: of layers with full attention.

    Raises:
        ValueError: if a value is wrong; the message names it.
    """
    family = need.family
    attention_bias = need.flag("attention_bias")
    hidden_size, scales = need.integer("hidden_size"), family.scales_embedding
    return DecoderTraits(
        qkv_bias=attention_bias or need.flag("qkv_bias") or family.always_qkv_bias,
        o_bias=need.flag(family.o_bias_key),
        mlp_bias=need.flag("mlp_bias"),
        hidden_act=need.choice(family.hidden_act_key, HIDDEN_ACTS),
        rms_norm_eps=need.number("rms_norm_eps", zero=True),
        norms=family.norms,
        norm_offset=family.norm_offset,
        qk_norm="head" if need.flag("use_qk_norm") else family.qk_norm,
        latent=latent,
        delta=delta,
        has_output_gate=family.has_output_gate,
        attention_scale=_attention_scale(need, head_dim) if latent is None else _latent_scale(latent, full_rope),
        attention_soft_cap=need.optional_number("attn_logit_softcapping"),
        has_sinks=family.has_sinks,
        embedding_multiplier=_factor(need, "embedding_multiplier") * (hidden_size**0.5 if scales else 1),
        rounds_embedding_multiplier=scales,
        residual_multiplier=_factor(need, "residual_multiplier"),
        logits_divisor=_factor(need, "logits_scaling"),
        logits_soft_cap=need.optional_number("final_logit_softcapping"),
    )


def _factor(need: ConfigReader, name: str) -> float:
    """The number that key `name` has, or 1 for a family without it."""
    return need.number(name) if need.has(name) else 1.0


def _attention_scale(need: ConfigReader, head_dim: int) -> float:
    """1 / sqrt(head_dim), where no key says otherwise."""
    if need.has("attention_multiplier"):
        return need.number("attention_multiplier")
    scalar: float = need.number("query_pre_attn_scalar") if need.has("query_pre_attn_scalar") else head_dim
    return scalar**-0.5


def _latent_scale(latent: LatentTraits, rope: RopeConfig) -> float:
    """In the order in which transformers computes it."""
    return latent.query_dim**-0.5 * rope.latent_mscale * rope.latent_mscale


def _rotates(need: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Which layers have positions: `no_rope_layers` has a 1 for each that has."""
    if not need.has("no_rope_layers"):
        return (True,) * num_layers
    interval = need.integer("no_rope_layer_interval")
    given = need.value("no_rope_layers")
    if given is None:
        return tuple((index + 1) % interval != 0 for index in range(num_layers))
    if not isinstance(given, list) or len(given) < num_layers or not all(type(one) is int for one in given):
        raise need.wrong("no_rope_layers", "must have a 0 or a 1 for each layer", given)
    return tuple(one != 0 for one in given[:num_layers])


def _linear_layers(need: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Which layers are linear: by `layer_types`, or all but every so many-th."""
    if not need.has("full_attention_interval"):
        return (False,) * num_layers
    interval = need.integer("full_attention_interval")
    kinds = _layer_types(need, num_layers)
    if kinds is None:
        kinds = [FULL if (index + 1) % interval == 0 else LINEAR for index in range(num_layers)]
    if FULL not in kinds:
        names = "'layer_types' and 'full_attention_interval'"
        raise ValueError(f"{need.file}: by {names} none of the {num_layers} layers has full attention")
    if SLIDING in kinds:
        raise need.wrong("layer_types", f"must give {LINEAR} or {FULL} for each layer", need.value("layer_types"))
    return tuple(kind == LINEAR for kind in kinds)


def _windows(need: ConfigReader, num_layers: int, rotates: tuple[bool, ...]) -> tuple[int | None, ...]:
    """The sliding window of each layer, by the keys that the family has: others have no effect, as in transformers."""
    kinds = _layer_types(need, num_layers)
    need.take("sliding_window_pattern")  # without effect beside `layer_types`
    if not need.has("sliding_window"):
        return (None,) * num_layers
    window = need.optional_integer("sliding_window", minimum=0)
    first = need.integer("max_window_layers", minimum=0) if need.has("max_window_layers") else 0
    if need.has("use_sliding_window") and not need.flag("use_sliding_window"):
        window = None
    if window == 0:
        raise need.wrong("sliding_window", "must be a positive integer", 0)
    if kinds is None or not need.has("layer_types"):
        if need.family.window_rule in ("but every fourth", "but every so many"):
            pattern = need.integer("sliding_window_pattern") if need.has("sliding_window_pattern") else 4
            return tuple(window if (index + 1) % pattern else None for index in range(num_layers))
        if need.family.window_rule == "every other":
            return tuple(None if index % 2 else window for index in range(num_layers))
        if need.family.window_rule == "without rotation":
            return tuple(None if rotates[index] else window for index in range(num_layers))
        if need.family.window_rule == "every other below":
            if need.flag("use_sliding_window") and window is None:
                raise need.wrong("sliding_window", "must be a positive integer", None)
            return tuple(window if index % 2 == 0 and index < first else None for index in range(num_layers))
        return tuple(window if index >= first else None for index in range(num_layers))
    if window is None and SLIDING in kinds:
        raise ValueError(f"{need.file}: 'layer_types' has sliding_attention, but no 'sliding_window' is in use")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def idle_window_keys(need: ConfigReader, layers: tuple[LayerSpec, ...]) -> tuple[str, ...]:
    """The keys that ask for other windows than there are, and have no effect as the family doesn't have them."""
    slides = [layer.window is not None for layer in layers]
    given = {name: need.config.get(name) for name in WINDOW_KEYS if not need.has(name)}
    kinds = given.get("layer_types")
    asks = {
        "sliding_window": given.get("sliding_window") not in (None, 0),
        "use_sliding_window": given.get("use_sliding_window") is False and any(slides),
        "max_window_layers": given.get("max_window_layers") not in (None, 0) and any(slides),
        "layer_types": kinds is not None and [kind == SLIDING for kind in kinds] != slides,
    }
    return tuple(name for name in WINDOW_KEYS if asks[name])


def _layer_types(need: ConfigReader, num_layers: int) -> list[str] | None:
    kinds = need.value("layer_types")
    if kinds is None:
        return None
    if need.has("index_topk"):
        if kinds != [INDEXED] * num_layers:
            raise need.wrong("layer_types", f"must give {INDEXED} for each layer", kinds)
        return None
    known = {**KINDS, LINEAR: LINEAR} if need.has("full_attention_interval") else KINDS
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or not all(isinstance(kind, str) and kind in known for kind in kinds)
    ):
        names = f"{FULL} or {LINEAR}" if LINEAR in known else f"{FULL} or {SLIDING}"
        raise ValueError(f"{need.file}: 'layer_types' must give {names} for each layer")
    return [known[kind] for kind in kinds]
