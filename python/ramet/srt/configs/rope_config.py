"""Owns what a config says of rotary positions, in all its spellings. The angles are computed in the layers."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ramet.srt.configs.config_reader import ConfigReader, is_finite
from ramet.srt.configs.harmless_keys import short

ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
}
FULL, SLIDING = "full_attention", "sliding_attention"  # layer types
ORIGINAL_LENGTH = "original_max_position_embeddings"
# What YaRN's object may have beside its fields, and what stands for it where it doesn't.
YARN_OPTIONS = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "mscale": None, "mscale_all_dim": None}
LONGROPE_FACTORS = ("short_factor", "long_factor")

# Parameters that change nothing at 1. The last two are other engines'; transformers doesn't look at them.
NEUTRAL_AT_ONE = ("factor", "partial_rotary_factor", "attn_factor", "extrapolation_factor")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding parameters; `scaling` holds the fields of a rope type other than "default".

    YaRN's are factor, original_max_position_embeddings, beta_fast, beta_slow and truncate. LongRoPE's are short_factor
    and long_factor, a divisor for each pair of columns, and original_max_position_embeddings, up to which the first
    counts.
    """

    theta: float
    rope_type: str = "default"
    rotary_factor: float = 1.0  # the share of a head's columns that rotate, the first ones
    scaling: dict[str, Any] = field(default_factory=dict)
    attention_factor: float = 1.0  # of all cosines and sines
    latent_mscale: float = 1.0  # of latent attention: its scores are multiplied by it twice
    query_beta: float = 0.0  # queries grow by 1 + beta * ln(1 + how often the original length fits before them)
    ignored_theta: float | None = None  # of a rope_parameters that doesn't count, where it is another one

    @property
    def switch_len(self) -> int | None:
        """Tokens that a sequence has at most for the first of two sets of frequencies; None where there is one set."""
        return int(self.scaling[ORIGINAL_LENGTH]) if self.rope_type == "longrope" else None

    def rotary_dim(self, head_dim: int) -> int:
        """How many of a head's columns rotate."""
        return int(head_dim * self.rotary_factor)


def read_ropes(reader: ConfigReader, head_dim: int) -> dict[str, RopeConfig]:
    """The positions of each layer type, in both spellings: `rope_parameters` (transformers 5) and those before it.

    The rules are those of transformers 5: a `rope_scaling` that isn't empty is taken in place of the whole
    `rope_parameters`, whose `rope_theta` is gone with it; a `rope_theta` beside them counts if the object has none.

    Raises:
        ValueError: if a value is wrong, or scales positions in a way that is not supported; the message names it.
    """
    if reader.family.has_rope_by_layer_type:
        return _ropes_by_layer_type(reader, head_dim)
    source, parameters = _parameters(reader)
    theta = parameters.get("rope_theta") if "rope_theta" in parameters else reader.value("rope_theta")
    rope = _read_rope(reader, source, parameters, theta, head_dim)
    rope = dataclasses.replace(rope, ignored_theta=_ignored_theta(reader, source, rope.theta))
    return {FULL: rope, SLIDING: rope}


def _ropes_by_layer_type(reader: ConfigReader, head_dim: int) -> dict[str, RopeConfig]:
    """Gemma's rule: `rope_parameters` has an object for each type, and `rope_scaling` is added to the full one's."""
    keys = ("rope_parameters", "rope_scaling")
    reader.take(*keys)
    given, scaling = ({} if reader.config.get(key) is None else reader.config[key] for key in keys)
    if not isinstance(scaling, dict):
        raise reader.wrong("rope_scaling", "must be an object or null", scaling)
    if not isinstance(given, dict) or not given.keys() <= {FULL, SLIDING}:
        raise reader.wrong("rope_parameters", f"must be null or have an object for {FULL} and for {SLIDING}", given)
    if ORIGINAL_LENGTH in reader.config:  # counts for nothing in transformers, where others read it
        raise reader.wrong(ORIGINAL_LENGTH, "must be in the object of a layer type", reader.config[ORIGINAL_LENGTH])
    ropes = {}
    for kind, theta_key in ((FULL, "rope_theta"), (SLIDING, "rope_local_base_freq")):
        part = {"rope_type": "default"} if given.get(kind) is None else given[kind]
        if not isinstance(part, dict):
            raise reader.wrong("rope_parameters", f"must have an object for {kind}", part)
        added = scaling if kind == FULL else {}
        source = "rope_scaling" if added else f"rope_parameters.{kind}"
        # A family without a key for layers with a window has its own default there, whatever `rope_theta` says.
        theta = reader.value(theta_key) if reader.has(theta_key) else reader.family.defaults["rope_theta"]
        if reader.has(theta_key) and theta_key in reader.config and "rope_theta" not in {**part, **added}:
            theta = _positive(reader, theta_key, theta)
        parameters = {"rope_theta": theta, **part, **added}
        ropes[kind] = rope = _read_rope(reader, source, parameters, parameters["rope_theta"], head_dim)
        if rope.rope_type not in ("default", "linear", "yarn") or not rope.scaling.get("truncate", True):
            raise ValueError(f"{reader.file}: rope type {rope.rope_type!r} by layer type is not supported so")
    return ropes


def _read_rope(reader: ConfigReader, source: str, parameters: dict[str, Any], theta: Any, head_dim: int) -> RopeConfig:
    """What one object says, which messages call `source`."""
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    types = reader.family.rope_types or dict(zip(ROPE_FIELDS, ROPE_FIELDS, strict=True))
    if not isinstance(rope_type, str) or rope_type not in types:
        known = ", ".join(types)
        raise ValueError(
            f"{reader.file}: rope type {short(rope_type)} of {source!r} is not supported; known are {known}"
        )
    rope_type = types[rope_type]
    scaling = {name: _scaling_value(reader, rope_type, parameters, name) for name in ROPE_FIELDS[rope_type]}
    _refuse_other_parameters(reader, source, rope_type, parameters)
    if rope_type == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(
            f"{reader.file}: 'high_freq_factor' ({scaling['high_freq_factor']}) of {source!r} must be above "
            f"'low_freq_factor' ({scaling['low_freq_factor']})"
        )
    theta = _positive(reader, "rope_theta", theta)
    rotary_factor = _rotary_factor(reader, parameters, head_dim)
    if rope_type == "longrope":
        rope = _longrope(reader, source, parameters, theta, scaling, int(head_dim * rotary_factor) // 2)
    elif rope_type != "yarn":
        rope = RopeConfig(theta=theta, rope_type=rope_type, scaling=scaling)
    elif theta == 1:
        raise reader.wrong("rope_theta", "must not be 1 with rope type 'yarn'", theta)
    else:
        rope = _yarn(reader, source, parameters, theta, scaling)
    return dataclasses.replace(
        rope, rotary_factor=rotary_factor, query_beta=_query_beta(reader, source, rope_type, parameters)
    )


def _query_beta(reader: ConfigReader, source: str, rope_type: str, parameters: dict[str, Any]) -> float:
    name = "llama_4_scaling_beta"
    if not reader.family.scales_queries:
        return 0.0
    if rope_type != "yarn":
        raise ValueError(f"{reader.file}: rope type {rope_type!r} of {source!r} is not supported; known is yarn")
    value: Any = parameters.get(name)
    if not is_finite(value) or value < 0:
        raise ValueError(f"{reader.file}: {name!r} of {source!r} must be a number of at least 0; got {short(value)}")
    return float(value)


def _rotary_factor(reader: ConfigReader, parameters: dict[str, Any], head_dim: int) -> float:
    """The share of a head that rotates: one inside the object goes before one beside it."""
    name = source = "partial_rotary_factor"
    if not reader.has(name):
        return 1.0
    value = reader.value(name)
    columns = reader.optional_integer("rotary_dim") if reader.has("rotary_dim") else None
    if columns is not None and name not in reader.config and name not in parameters:
        source, value = "rotary_dim", columns / head_dim
    if value is None and reader.may_be_none(name):
        value = 1.0
    value = parameters.get(name, value)
    if not is_finite(value) or not 0 < value <= 1 or int(head_dim * value) % 2 or int(head_dim * value) < 2:
        what = f"must have an even number of a head's {head_dim} columns rotate"
        raise ValueError(f"{reader.file}: {source!r} {what}; got {short(value)}")
    return float(value)


def _ignored_theta(reader: ConfigReader, source: str, theta: float) -> float | None:
    """What a `rope_parameters` has that `rope_scaling` replaces: who added the latter may not have meant that."""
    replaced = reader.config.get("rope_parameters") if source == "rope_scaling" else None
    other: Any = replaced.get("rope_theta") if isinstance(replaced, dict) else None
    return float(other) if is_finite(other) and other != theta else None


def _yarn(
    reader: ConfigReader, source: str, parameters: dict[str, Any], theta: float, scaling: dict[str, Any]
) -> RopeConfig:
    """YaRN (Peng et al., 2023). Its attention factor is 0.1 ln(factor) + 1, unless the object says otherwise."""
    options = dict(YARN_OPTIONS)
    for name in YARN_OPTIONS:
        is_off = name in ("mscale", "mscale_all_dim") and parameters.get(name) == 0  # as if it weren't there
        if parameters.get(name) is not None and not is_off:
            options[name] = _positive(
                reader, name, parameters[name], f"{name!r} of {source!r} must be a positive number"
            )
    truncate = parameters.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"{reader.file}: 'truncate' of {source!r} must be true or false; got {short(truncate)}")
    attention_factor = options["attention_factor"]
    if attention_factor is None:
        mscale, all_dim = options["mscale"], options["mscale_all_dim"]
        attention_factor = _mscale(scaling["factor"], 1.0)
        if mscale is not None and all_dim is not None:
            attention_factor = _mscale(scaling["factor"], mscale) / _mscale(scaling["factor"], all_dim)
    scaling |= {name: options[name] for name in ("beta_fast", "beta_slow")} | {"truncate": truncate}
    return RopeConfig(
        theta=theta,
        rope_type="yarn",
        scaling=scaling,
        attention_factor=attention_factor,
        latent_mscale=_mscale(scaling["factor"], options["mscale_all_dim"] or 0.0),
    )


def _longrope(
    reader: ConfigReader, source: str, parameters: dict[str, Any], theta: float, scaling: dict[str, Any], num_pairs: int
) -> RopeConfig:
    """LongRoPE (Ding et al., 2024). Its attention factor is sqrt(1 + ln(factor) / ln(original length)).

    Without a `factor` that is the ratio of the two lengths.
    """
    original = scaling[ORIGINAL_LENGTH]
    if original != int(original):
        raise reader.wrong(ORIGINAL_LENGTH, "must be a whole number", original)
    for name in LONGROPE_FACTORS:
        factors = parameters.get(name)
        if not isinstance(factors, list) or len(factors) != num_pairs or not all(map(_is_positive, factors)):
            raise ValueError(
                f"{reader.file}: {name!r} of {source!r} must have a positive number for each of the {num_pairs} pairs "
                f"of columns that rotate; got {short(factors)}"
            )
        scaling[name] = [float(factor) for factor in factors]
    options = {
        name: _positive(reader, name, parameters[name], f"{name!r} of {source!r} must be a positive number")
        for name in ("factor", "attention_factor")
        if parameters.get(name) is not None
    }
    factor = options.get("factor", reader.integer("max_position_embeddings") / original)
    if factor > 1 and original <= 1:
        raise reader.wrong(ORIGINAL_LENGTH, "must be more than 1", original)
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeConfig(
        theta=theta,
        rope_type="longrope",
        scaling=scaling,
        attention_factor=options.get("attention_factor", attention_factor),
    )


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def scaled_length(reader: ConfigReader, rope: RopeConfig) -> int:
    """The number of tokens that the model was made for.

    Linear scaling stretches `max_position_embeddings`, unless the config also has the length before the scaling. YaRN
    stretches the length before it, which may give more than `max_position_embeddings`: many configs leave that alone.
    """
    length = reader.integer("max_position_embeddings")
    if rope.rope_type not in ("linear", "yarn") or reader.family.has_rope_by_layer_type:
        return length  # up to which dynamic scaling changes nothing
    _, parameters = _parameters(reader)
    original = parameters.get(ORIGINAL_LENGTH) or reader.config.get(ORIGINAL_LENGTH)
    if rope.rope_type == "linear" and original is not None:
        return length
    stretched = rope.scaling.get(ORIGINAL_LENGTH, length) * rope.scaling["factor"]
    if not 1 <= stretched < 2**31:
        raise ValueError(f"{reader.file}: 'factor' ({rope.scaling['factor']}) gives the model {stretched} tokens")
    return int(stretched) if rope.rope_type == "linear" else max(length, int(stretched))


def _parameters(reader: ConfigReader) -> tuple[str, dict[str, Any]]:
    """The object that counts, and the name of its key."""
    reader.take("rope_parameters", "rope_scaling", "rope_theta", ORIGINAL_LENGTH)
    source = "rope_scaling" if reader.config.get("rope_scaling") else "rope_parameters"
    parameters = reader.config.get(source)
    if parameters is None:
        return source, reader.family.defaults.get("rope_parameters", {})
    if not isinstance(parameters, dict):
        raise reader.wrong(source, "must be an object or null", parameters)
    layer_types = [name for name, value in parameters.items() if isinstance(value, dict)]
    if layer_types:
        raise ValueError(f"{reader.file}: {source!r} by layer type ({', '.join(layer_types)}) is not supported")
    return source, parameters


def _scaling_value(reader: ConfigReader, rope_type: str, parameters: dict[str, Any], name: str) -> float:
    value = parameters.get(name)
    if name == ORIGINAL_LENGTH and (name not in parameters or value is not None):
        # One beside the object goes before one inside; without both, the length is the model's.
        if name in reader.config or reader.has(name):
            value = reader.value(name)
        elif name not in parameters:
            value = reader.integer("max_position_embeddings")
    return _positive(reader, name, value, f"rope type {rope_type!r} needs a positive number {name!r}")


def _is_positive(value: Any) -> bool:
    return is_finite(value) and value > 0


def _positive(reader: ConfigReader, name: str, value: Any, sentence: str | None = None) -> float:
    if not _is_positive(value):
        if sentence is None:
            raise reader.wrong(name, "must be a positive number", value)
        raise ValueError(f"{reader.file}: {sentence}; got {short(value)}")
    return float(value)


def _refuse_other_parameters(reader: ConfigReader, source: str, rope_type: str, parameters: dict[str, Any]) -> None:
    """Raise ValueError for what asks for another rotation than the type's: a part of each head, other factors."""
    used = {"rope_type", "type", "rope_theta", ORIGINAL_LENGTH, *ROPE_FIELDS[rope_type], *reader.family.rope_extras}
    if reader.has("partial_rotary_factor"):
        used.add("partial_rotary_factor")
    if rope_type == "yarn":
        used |= {*YARN_OPTIONS, "truncate", "finetuned"}  # the last tells how the model was made
    if rope_type == "longrope":
        used |= {*LONGROPE_FACTORS, "factor", "attention_factor"}
    for name, value in parameters.items():
        neutral = name in NEUTRAL_AT_ONE and is_finite(value) and value == 1
        if name not in used and not neutral:
            what = f"{short(name)} ({short(value)}) of {source!r}"
            raise ValueError(f"{reader.file}: {what} is not supported with rope type {rope_type!r}")
