"""Owns the reading of a model folder's config: what the engine must know of a model before it builds it. No torch."""

import json
import os
from dataclasses import dataclass, field
from typing import Any

from ramet.srt.configs.moe_config import MoeConfig, read_moe_config
from ramet.srt.configs.tokenizer_config import read_eos_token_id

DTYPE_NAMES = {"float32", "bfloat16", "float16"}
DEFAULT_ROPE_THETA = 10000.0


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding parameters; `scaling` holds the fields of a rope type other than "default"."""

    theta: float
    rope_type: str = "default"
    scaling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model's shape, types and token limits, from its config.json and generation_config.json."""

    path: str
    model_name: str
    revision: str
    architecture: str
    dtype: str
    context_len: int  # tokens
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    rope: RopeConfig
    quantization: str  # "" or "fp8": of the weights of linear layers and experts
    layer_windows: tuple[int | None, ...]  # per layer: sliding window in tokens, or None for full attention
    eos_token_ids: tuple[int, ...]
    moe: MoeConfig | None  # None for a dense model
    hf_config: dict[str, Any]

    @property
    def dimensions(self) -> dict[str, int]:
        """The sizes that the shapes of the weights come from, by their names in a config.json."""
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim")  # fmt: skip
        dimensions = {name: getattr(self, name) for name in names}
        if self.moe is not None:
            dimensions |= {"num_experts": self.moe.num_experts, "moe_intermediate_size": self.moe.intermediate_size}
        return dimensions

    @classmethod
    def from_path(
        cls,
        path: str,
        *,
        model_name: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        context_length: int | None = None,
        quantization: str | None = None,
        tokenizer_path: str | None = None,
    ) -> "ModelConfig":
        """Read the config of the model in folder `path`.

        Args:
            dtype: "auto" takes the checkpoint's type.
            context_length: tokens; at most what the model was made for.
            quantization: "fp8", or None for the checkpoint's.
            tokenizer_path: folder of the tokenizer, whose end token is one of the model's; `path` when not given.

        Raises:
            ValueError: if the folder or its config is missing or broken; the message names the file and the field.
        """
        hf_config = read_json(path, "config.json")
        architectures = hf_config.get("architectures")
        if not isinstance(architectures, list) or not architectures:
            raise ValueError(f"{path}/config.json: 'architectures' must name the model's class")
        need = _Reader(hf_config, os.path.join(path, "config.json"))
        num_heads = need.integer("num_attention_heads")
        hidden_size = need.integer("hidden_size")
        num_layers = need.integer("num_hidden_layers")
        num_kv_heads = need.integer("num_key_value_heads", default=num_heads)
        head_dim = need.integer("head_dim", default=hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"{need.file}: num_attention_heads ({num_heads}) is not a multiple of "
                f"num_key_value_heads ({num_kv_heads})"
            )
        rope = _rope_config(hf_config, need.file)
        return cls(
            path=path,
            model_name=model_name or path,
            revision=revision or "",
            architecture=architectures[0],
            dtype=_dtype(hf_config, dtype, need.file),
            context_len=_context_len(need, rope, context_length),
            vocab_size=need.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=need.integer("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(hf_config.get("rms_norm_eps", 1e-6)),
            hidden_act=str(hf_config.get("hidden_act", "silu")),
            tie_word_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
            rope=rope,
            quantization=quantization or _quantization(hf_config, need.file),
            layer_windows=_layer_windows(hf_config, num_layers, need.file),
            eos_token_ids=_eos_token_ids(path, tokenizer_path or path, hf_config, need.integer("vocab_size")),
            moe=read_moe_config(architectures[0], need, num_layers),
            hf_config=hf_config,
        )


def read_json(folder: str, name: str) -> dict[str, Any]:
    """The JSON object in file `name` of `folder`.

    Raises:
        ValueError: if there is no such folder or file, or it holds no JSON object.
    """
    file = os.path.join(folder, name)
    if not os.path.isdir(folder):
        raise ValueError(f"model path {folder} is not a folder")
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file} can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return content


class _Reader:
    """Reads required numbers from a config and names the field when one is missing or wrong."""

    def __init__(self, config: dict[str, Any], file: str):
        self.config = config
        self.file = file

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.config.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.file}: {name!r} must be a positive integer; got {value!r}")
        return value


def _dtype(hf_config: dict[str, Any], wanted: str, file: str) -> str:
    if wanted != "auto":
        return wanted
    name = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise ValueError(f"{file}: dtype {name!r} is not supported; use --dtype with one of {sorted(DTYPE_NAMES)}")
    return name


def _quantization(hf_config: dict[str, Any], file: str) -> str:
    """How the checkpoint's linear layers are quantised: "" or "fp8".

    Both spellings of fp8 checkpoints: the method "fp8", and compressed-tensors with 8-bit float weights.
    """
    config = hf_config.get("quantization_config")
    if not config:
        return ""
    method = config.get("quant_method")
    if method == "fp8" or (method == "compressed-tensors" and config.get("format") == "float-quantized"):
        return "fp8"
    raise ValueError(f"{file}: the quantisation {method!r} is not supported; fp8 is")


def _rope_config(hf_config: dict[str, Any], file: str) -> RopeConfig:
    """Both spellings: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (before it)."""
    parameters = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{file}: rope parameters must be an object; got {parameters!r}")
    theta = parameters.get("rope_theta", hf_config.get("rope_theta", DEFAULT_ROPE_THETA))
    rope_type = str(parameters.get("rope_type", parameters.get("type", "default")))
    if rope_type not in ROPE_FIELDS:
        raise ValueError(f"{file}: rope type {rope_type!r} is not supported; known are {', '.join(ROPE_FIELDS)}")
    scaling = {}
    for name in ROPE_FIELDS[rope_type]:
        value = parameters.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{file}: rope type {rope_type!r} needs a positive number {name!r}; got {value!r}")
        scaling[name] = value
    return RopeConfig(theta=float(theta), rope_type=rope_type, scaling=scaling)


ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _context_len(need: _Reader, rope: RopeConfig, wanted: int | None) -> int:
    derived = need.integer("max_position_embeddings", default=2048)
    if rope.rope_type == "linear":
        derived = int(derived * rope.scaling["factor"])
    if wanted is not None and wanted > derived:
        raise ValueError(f"--context-length {wanted} is beyond the model's {derived} tokens ({need.file})")
    return wanted or derived


def _layer_windows(hf_config: dict[str, Any], num_layers: int, file: str) -> tuple[int | None, ...]:
    """The sliding window of each layer, by transformers' rules for `layer_types` and the older fields."""
    window = hf_config.get("sliding_window")
    if window is None or hf_config.get("use_sliding_window") is False:
        return (None,) * num_layers
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"{file}: 'sliding_window' must be a positive integer; got {window!r}")
    layer_types = hf_config.get("layer_types")
    if layer_types is not None:
        if len(layer_types) != num_layers or set(layer_types) - {"full_attention", "sliding_attention"}:
            raise ValueError(f"{file}: 'layer_types' must give full_attention or sliding_attention for each layer")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    # Qwen3-MoE has the fields of Qwen3, but a window that is used is used in every layer.
    if "use_sliding_window" in hf_config and hf_config.get("model_type") != "qwen3_moe":
        first = int(hf_config.get("max_window_layers", 0))
        return tuple(window if index >= first else None for index in range(num_layers))
    return (window,) * num_layers


def _eos_token_ids(path: str, tokenizer_path: str, hf_config: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The end tokens of config.json, generation_config.json and the tokenizer together, but those that no model gives.

    Raises:
        ValueError: if one of the files has something else than ids there.
    """
    generation = read_json(path, "generation_config.json") if has_file(path, "generation_config.json") else {}
    ids: list[int] = []
    for name, config in (("config.json", hf_config), ("generation_config.json", generation)):
        value = config.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and (isinstance(token_id, bool) or not isinstance(token_id, int)):
                raise ValueError(f"{os.path.join(path, name)}: 'eos_token_id' must be a token id or a list of them; "
                                 f"got {value!r:.60}")  # fmt: skip
            ids.append(-1 if token_id is None else token_id)
    tokenizer_id = read_eos_token_id(tokenizer_path)
    ids.append(-1 if tokenizer_id is None else tokenizer_id)
    return tuple(dict.fromkeys(token_id for token_id in ids if 0 <= token_id < vocab_size))


def has_file(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))
