"""Owns reading adapters as peft writes them: adapter_config.json and the header of adapter_model.safetensors.

The rules by which a config's patterns choose modules, ranks and scales are peft's (LoraConfig's documentation). What
would change the computation and is not supported is refused by its name.
"""

import json
import math
import os
from typing import Any

import msgspec

from ramet.srt.lora.adapter import (
    LoraAdapter,
    LoraModule,
    LoraTargets,
    check_lora_name,
    match_start,
    split_tensor_name,
)
from ramet.srt.model_loader.checkpoint.bare_decoder import whole_name
from ramet.srt.model_loader.checkpoint.checks import PLAIN_FLOATS
from ramet.srt.model_loader.checkpoint.digest_store import load_table
from ramet.srt.model_loader.checkpoint.safetensors_header import TensorInfo, read_header
from ramet.srt.weights.errors import name_some

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

READ_KEYS = frozenset(
    {
        "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
    }
)  # fmt: skip
# How the adapter was trained, or made before that; where it came from; how it is kept in memory.
HARMLESS_KEYS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config",
        "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    }
)  # fmt: skip
# Ways to begin the training that leave the model itself as it is. Others take something out of its matrices.
INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
EMPTY: tuple[Any, ...] = (None, False, "", 0)


def find_adapter_file(folder: str) -> str:
    """The file with a folder's adapter. Raises ValueError if there is none."""
    path = os.path.join(folder, WEIGHTS_FILE)
    if os.path.isfile(folder):
        raise ValueError(f"{folder} is a file; the folder that holds the adapter is expected")
    if not os.path.isdir(folder):
        raise ValueError(f"there is no adapter folder {folder}")
    if not os.path.isfile(path):
        raise ValueError(f"{folder} holds no adapter: it has no {WEIGHTS_FILE}")
    return path


def read_adapter(name: str, folder: str) -> LoraAdapter:
    """What is to be known of a folder's adapter. Reads its file once, for the digest, unless that is known.

    Raises:
        ValueError: if it is none, is broken, or does something that is not supported; the message names it.
    """
    check_lora_name(name)
    path = find_adapter_file(folder)
    config_path = os.path.join(folder, CONFIG_FILE)
    config = _read_config(config_path)
    _check_config(config, config_path)
    header = read_header(path)
    modules = _read_modules(config, config_path, header, path)
    targets = _read_targets(config, config_path)
    if idle := [module.file_name for module in modules if not targets.has(module.file_name)]:
        raise ValueError(f"{path} has matrices for {name_some(idle)}, which {config_path} does not name as targets")
    dtypes = sorted({info.dtype for info in header.values()})
    if len(dtypes) > 1 or dtypes[0] not in PLAIN_FLOATS:
        raise ValueError(f"{path} holds {', '.join(dtypes)}: all of it must be one of {', '.join(PLAIN_FLOATS)}")
    return LoraAdapter(name=name, dtype=dtypes[0], digest=load_table(path).digest, modules=modules, targets=targets)


def _read_config(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object")
    return config


def _check_config(config: dict[str, Any], path: str) -> None:
    """Refuse what is of another kind, or wants more than products of two matrices."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; LORA is supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias {config['bias']!r} is not supported: an adapter with biases of its own")
    if config.get("init_lora_weights") not in INITIALISATIONS:
        raise ValueError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} is not supported: it changes the model's own "
            "matrices (peft can convert such an adapter into a plain one)"
        )
    for key, value in config.items():
        is_empty = value in EMPTY or value == [] or value == {}
        if key not in READ_KEYS and key not in HARMLESS_KEYS and not is_empty:
            raise ValueError(f"{path}: {key} is not supported")
    for key, kind in (("r", int), ("lora_alpha", (int, float))):
        if isinstance(config.get(key), bool) or not isinstance(config.get(key), kind):
            raise ValueError(f"{path}: {key} must be a number; got {config.get(key)!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"{path}: {key} must be an object; got {config[key]!r}")


def _read_targets(config: dict[str, Any], path: str) -> LoraTargets:
    layers, layers_in = config.get("layers_to_transform"), config.get("layers_pattern") or []
    values = {
        "chosen": config.get("target_modules"),
        "excluded": config.get("exclude_modules") or [],
        "layers": [] if layers is None else layers if isinstance(layers, list) else [layers],
        "layers_in": layers_in if isinstance(layers_in, list) else [layers_in],
    }
    try:
        return msgspec.convert(values, LoraTargets)
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: target_modules and exclude_modules must be lists of names or patterns, "
                         f"layers_to_transform numbers, layers_pattern names: {error}") from error  # fmt: skip


def _read_modules(
    config: dict[str, Any], config_path: str, header: dict[str, TensorInfo], path: str
) -> tuple[LoraModule, ...]:
    parts: dict[str, dict[bool, TensorInfo]] = {}  # module -> whether it is A -> tensor
    for name, info in header.items():
        found = split_tensor_name(name)
        if found is None:
            raise ValueError(f"{path} has {name}, which is no part of a product of two matrices: it is not supported")
        parts.setdefault(found[0], {})[found[1]] = info
    if not parts:
        raise ValueError(f"{path} holds no tensors")
    modules = []
    for name, tensors in parts.items():
        if len(tensors) < 2:
            raise ValueError(f"{path} has only one of the two matrices of {name}")
        a, b = tensors[True], tensors[False]
        rank = _by_pattern(config, "rank_pattern", name, config["r"])
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(f"{path}: the matrices of {name} have the shapes {a.shape} and {b.shape}; {config_path} "
                             f"gives it the rank {rank}")  # fmt: skip
        alpha = _by_pattern(config, "alpha_pattern", name, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        modules.append(LoraModule(name=whole_name(name), rank=rank, scale=scale, file_name=name))
    return tuple(sorted(modules, key=lambda module: module.name))


def _by_pattern(config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a module's name."""
    for pattern, value in (config.get(key) or {}).items():
        if match_start(rf"(.*\.)?({pattern})$", module):
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ValueError(f"{key} {pattern!r} must be a number above 0; got {value!r}")
            return value
    return default
