"""Makes random adapters as peft writes them, and the models that they are merged into, to compare with."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
PEFT_CONFIG = {  # what peft writes beside what is given
    "auto_mapping": None, "base_model_name_or_path": "base", "bias": "none", "corda_config": None,
    "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "lora_bias": False,
    "lora_dropout": 0.05, "megatron_config": None, "modules_to_save": None, "peft_type": "LORA",
    "peft_version": "0.18.0", "qalora_group_size": 16, "revision": None, "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False, "use_qalora": False,
    "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip


def make_adapter(
    folder: str | Path,
    model: str | Path,
    *,
    targets: Sequence[str] = ALL,
    rank: int = 6,
    alpha: float = 12,
    ranks: Mapping[str, int] | None = None,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write a random adapter for the matrices of a model whose names end in `targets`.

    Args:
        ranks: by the end of a matrix' name, where it is not `rank`; becomes rank_pattern.
        config: more of adapter_config.json.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(Path(model) / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if ".experts." in module or not module.endswith(tuple(targets)):
            continue
        own = next((value for end, value in (ranks or {}).items() if module.endswith(end)), rank)
        a = torch.randn(own, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        b = torch.randn(weight.shape[0], own, generator=generator) / own**0.5
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.to(dtype)
    values = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets), "rank_pattern": dict(ranks or {})}
    return write_adapter(folder, tensors, **values | config)


def write_adapter(folder: str | Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """Write an adapter's two files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG | config))
    return folder


def merge_adapter(model: str | Path, adapter: str | Path, folder: str | Path) -> Path:
    """Write the model W + scale * B A, by the rank of each A and the adapter's alpha, or that of `alpha_pattern`."""
    folder = Path(folder)
    shutil.copytree(model, folder)
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alphas = config["alpha_pattern"]
        alpha = next((alphas[end] for end in alphas if module.endswith(end)), config["lora_alpha"])
        scale = alpha / (math.sqrt(len(a)) if config["use_rslora"] else len(a))
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        weights[f"{module}.weight"] += (scale * b.double() @ a.double()).to(weights[f"{module}.weight"].dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
