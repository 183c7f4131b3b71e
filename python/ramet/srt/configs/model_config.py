"""Owns the reading of a model folder's config: what the engine must know of a model before it builds it. No torch."""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from ramet.srt.configs.config_reader import ConfigReader
from ramet.srt.configs.delta_config import read_delta
from ramet.srt.configs.kv_cache_config import AUTO, FP8_E4M3, OF_A_LAYER, check_cache_dtype, read_cache_scales
from ramet.srt.configs.latent_config import LatentTraits, read_latent
from ramet.srt.configs.layer_specs import DecoderTraits, LayerSpec, idle_window_keys, read_layers, read_traits
from ramet.srt.configs.left_out_modules import ModuleNaming
from ramet.srt.configs.model_families import find_family
from ramet.srt.configs.moe_config import MoeConfig, read_moe_config
from ramet.srt.configs.quantization_config import QuantizationConfig
from ramet.srt.configs.quantization_readers import MODELOPT_FILE, read_quantization
from ramet.srt.configs.rope_config import FULL, RopeConfig, read_ropes, scaled_length
from ramet.srt.configs.sentence_transformers import MATRYOSHKA_KEYS, EmbeddingConfig, read_embedding
from ramet.srt.configs.tokenizer_config import read_eos_token_id

# By the names that torch has for them, and so transformers takes.
DTYPES = {"float32": "float32", "float": "float32", "bfloat16": "bfloat16", "float16": "float16", "half": "float16"}
MOST_LAYERS = 4096


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
    head_dim: int  # columns of a head; with latent attention those that rotate
    tie_word_embeddings: bool
    rope: RopeConfig  # of layers with full attention
    quantization_config: QuantizationConfig | None  # of the weights of linear layers and experts
    layers: tuple[LayerSpec, ...]
    traits: DecoderTraits
    eos_token_ids: tuple[int, ...]
    moe: MoeConfig | None  # None for a dense model
    surplus_tensors: str  # a regular expression: what the files may hold beside the model
    idle_window_keys: tuple[str, ...]  # say something of windows, at which the family's class doesn't look
    kv_cache_dtype: str = AUTO  # "auto": the model's; see kv_cache_config
    cache_scales: str = ""  # what shares a scale of a cache in fp8, where the files hold such scales; else ""
    embedding: EmbeddingConfig | None = None  # of a model that makes embeddings, and has no output head; else None

    def differences(self, other: "ModelConfig") -> list[str]:
        """What the two compute otherwise, by its names; the weights' own type is no part of it."""
        rest = {
            "path",
            "model_name",
            "revision",
            "dtype",
            "kv_cache_dtype",
            "context_len",
            "eos_token_ids",
            "idle_window_keys",
        }
        one, two = (_without_file(config) for config in (self, other))
        names = (field.name for field in dataclasses.fields(self) if field.name not in rest)
        return [name for name in names if getattr(one, name) != getattr(two, name)]

    @property
    def has_cache_scales(self) -> bool:
        """Whether each layer has two weights more: the scales of its keys and values in a cache of fp8."""
        return self.cache_scales == OF_A_LAYER

    @property
    def has_fp8_cache(self) -> bool:
        return self.kv_cache_dtype == FP8_E4M3

    @property
    def quantization(self) -> str:
        """ "" or a format's name, such as "fp8": what the quantisation is called between instances."""
        return "" if self.quantization_config is None else self.quantization_config.name

    @property
    def dimensions(self) -> dict[str, int]:
        """The sizes that the shapes of the weights come from, by their names in a config.json."""
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim")  # fmt: skip
        dimensions = {name: getattr(self, name) for name in names}
        if self.traits.latent is not None:
            dimensions |= self.traits.latent.dimensions
        if self.traits.delta is not None:
            dimensions |= self.traits.delta.dimensions
        if self.moe is not None:
            dimensions |= {"num_experts": self.moe.num_experts, "moe_intermediate_size": self.moe.intermediate_size}
            if self.moe.shared_intermediate_size:
                dimensions["shared_expert_intermediate_size"] = self.moe.shared_intermediate_size
        if self.quantization_config is not None:
            dimensions |= self.quantization_config.dimensions
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
        is_embedding: bool = False,
        kv_cache_dtype: str = AUTO,
    ) -> "ModelConfig":
        """Read the config of the model in folder `path`.

        Args:
            dtype: "auto" takes the checkpoint's type.
            context_length: tokens; at most what the model was made for.
            quantization: "fp8", or None for the checkpoint's.
            tokenizer_path: folder of the tokenizer, whose end token is one of the model's; `path` when not given.
            is_embedding: whether the model is to make embeddings, even if its folder doesn't say that it does.
            kv_cache_dtype: one of KV_CACHE_DTYPES.

        Raises:
            ValueError: if the folder or its config is missing or broken; the message names the file and the field.
        """
        hf_config = read_json(path, "config.json")
        file = os.path.join(path, "config.json")
        family, hf_config = find_family(hf_config, file)
        need = ConfigReader(hf_config, file, family)
        num_heads = need.integer("num_attention_heads")
        num_layers = need.integer("num_hidden_layers", maximum=MOST_LAYERS)
        latent = read_latent(need, num_heads)
        head_dim = _head_dim(need, num_heads, latent)
        ropes = read_ropes(need, head_dim)
        moe = read_moe_config(need, num_layers)
        layers = read_layers(need, num_layers, ropes, moe)
        need.take(*MATRYOSHKA_KEYS)
        embedding = read_embedding(path, hf_config, is_embedding)
        modelopt = read_json(path, MODELOPT_FILE) if has_file(path, MODELOPT_FILE) else None
        cache_scales = read_cache_scales(hf_config, modelopt)
        check_cache_dtype(kv_cache_dtype, cache_scales, file)
        config = cls(
            path=path,
            model_name=model_name or path,
            revision=revision or "",
            architecture=family.architecture,
            dtype=_dtype(need, dtype),
            context_len=_context_len(need, ropes[FULL], context_length),
            vocab_size=need.integer("vocab_size"),
            hidden_size=need.integer("hidden_size"),
            intermediate_size=_intermediate_size(need, moe),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=_num_kv_heads(need, num_heads),
            head_dim=head_dim,
            tie_word_embeddings=need.flag("tie_word_embeddings"),
            rope=ropes[FULL],
            quantization_config=_quantization(need, modelopt, path, quantization, embedding is not None),
            layers=layers,
            traits=read_traits(need, head_dim, latent, ropes[FULL], read_delta(need)),
            eos_token_ids=_eos_token_ids(path, tokenizer_path or path, hf_config, need.integer("vocab_size")),
            moe=moe,
            surplus_tensors=_surplus_tensors(need, num_layers),
            idle_window_keys=idle_window_keys(need, layers),
            kv_cache_dtype=kv_cache_dtype,
            cache_scales=cache_scales,
            embedding=embedding,
        )
        need.refuse_the_unread()
        return config


def _without_file(config: ModelConfig) -> ModelConfig:
    quantization = config.quantization_config
    if quantization is None:
        return config
    return dataclasses.replace(config, quantization_config=dataclasses.replace(quantization, file=""))


def read_json(folder: str, name: str) -> dict[str, Any]:
    """The JSON object in file `name` of `folder`.

    Raises:
        ValueError: if there is no such folder or file, or it holds no JSON object.
    """
    file = os.path.join(folder, name)
    if not os.path.isdir(folder):
        kind = "a file" if os.path.isfile(folder) else "not there"
        raise ValueError(f"model path {folder} is {kind}; the folder that holds the model is expected")
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except (ValueError, RecursionError, OSError) as error:  # ValueError: also of numbers with thousands of digits
        raise ValueError(f"{file} can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return content


def _dtype(need: ConfigReader, wanted: str) -> str:
    """The wanted type, or else the config's; float32, which holds every other, where it has none."""
    need.take("dtype", "torch_dtype")
    if wanted != "auto":
        return wanted
    key = "dtype" if need.config.get("dtype") is not None else "torch_dtype"
    name = need.config.get(key)
    if name is None:
        return "float32"
    known = DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else None
    if known is None:
        raise ValueError(
            f"{need.file}: {key!r} {name!r} is not supported; use --dtype with one of {sorted(set(DTYPES.values()))}"
        )
    return known


def _intermediate_size(need: ConfigReader, moe: MoeConfig | None) -> int:
    """Of the MLPs; of a family without any, of an expert."""
    if moe is not None and not need.has("intermediate_size"):
        return moe.intermediate_size
    return need.integer("intermediate_size")


def _num_kv_heads(need: ConfigReader, num_heads: int) -> int:
    num_kv_heads = need.optional_integer("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{need.file}: num_attention_heads ({num_heads}) is not a multiple of num_key_value_heads ({num_kv_heads})"
        )
    return num_kv_heads


def _head_dim(need: ConfigReader, num_heads: int, latent: LatentTraits | None) -> int:
    """Columns of a head, which rotate in pairs; derived from the hidden size where neither file nor family say."""
    if latent is not None:
        return latent.rope_dim
    hidden_size = need.integer("hidden_size")
    head_dim = need.optional_integer("head_dim")
    if head_dim is None:
        if need.family.model_type == "llama" and hidden_size % num_heads:  # other families' classes round down
            raise ValueError(
                f"{need.file}: 'head_dim' is missing, and hidden_size ({hidden_size}) is not a multiple of "
                f"num_attention_heads ({num_heads})"
            )
        head_dim = hidden_size // num_heads
        if head_dim < 2 or head_dim % 2:
            raise ValueError(
                f"{need.file}: 'head_dim' is missing, and hidden_size ({hidden_size}) / num_attention_heads "
                f"({num_heads}) = {head_dim} is not an even number of at least 2"
            )
    if head_dim % 2:
        raise need.wrong("head_dim", "must be an even number", head_dim)
    return head_dim


def _quantization(
    need: ConfigReader, modelopt: dict[str, Any] | None, path: str, wanted: str | None, is_bare: bool
) -> QuantizationConfig | None:
    """How the weights are quantised: by config.json, by modelopt's file beside it, or because the user wants it.

    Args:
        modelopt: the content of that file, if there is one.
        is_bare: whether the decoder may have been quantised by itself, without "model." in front of its names.
    """
    prefixes = (*need.family.prefixes, "") if is_bare else need.family.prefixes
    naming = ModuleNaming(prefixes=prefixes, is_fused=need.family.is_fused)
    return read_quantization(need.config, modelopt, path, wanted, naming)


def _surplus_tensors(need: ConfigReader, num_layers: int) -> str:
    """What the family's files may hold, and the layers that draft tokens: they lie behind the model's own."""
    key = need.family.mtp_layers_key
    num_drafting = need.integer(key, minimum=0, maximum=MOST_LAYERS) if key else 0
    numbers = "|".join(str(num_layers + index) for index in range(num_drafting))
    return "|".join(filter(None, (need.family.surplus, rf"model\.layers\.({numbers})\." if numbers else "")))


def _context_len(need: ConfigReader, rope: RopeConfig, wanted: int | None) -> int:
    derived = scaled_length(need, rope)
    if wanted is not None and wanted > derived:
        raise ValueError(f"--context-length {wanted} is beyond the model's {derived} tokens ({need.file})")
    return wanted or derived


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
