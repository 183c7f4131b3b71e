"""Makes fp8 checkpoints, and the parameters that a rank has after it has read or quantised one."""

import json
import re
from pathlib import Path

import random_models as rm
import sharded_models as sm
import torch
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.quantization.fp8 import FP8, quantize_rows
from safetensors.torch import load_file, save_file

QUANTISED = re.compile(r"(_proj|\.w[123])\.weight$")


def load(folder: Path, parallel: ParallelConfig | None = None) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model of fp8 weights, from the files in a folder."""
    model = sm.build_model(folder, parallel or ParallelConfig(), "fp8")
    sm.load_from_disk(folder, sm.make_manifest(model)).bind(model)
    return dict(model.named_parameters())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def write_fp8(source: Path, target: Path, kind: str) -> Path:
    """The model in `source` as an fp8 checkpoint with scales for rows, blocks of 16 or whole tensors."""
    rm.without_weights(source, target)
    tensors = {}
    for file in source.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if not QUANTISED.search(name):
                tensors[name] = tensor
            elif kind == "rows":
                tensors[name], tensors[f"{name}_scale"] = quantize_rows(tensor)
            elif kind == "tensor":
                scale = tensor.float().abs().max() / 448
                tensors[name], tensors[f"{name}_scale"] = (tensor.float() / scale).to(FP8), scale
                tensors[name.replace("weight", "input_scale")] = torch.tensor(1.0)
            else:
                blocks = tensor.float().unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
                scale = blocks.abs().amax(dim=(1, 3)) / 448
                values = (blocks / scale[:, None, :, None]).to(FP8)
                tensors[name], tensors[f"{name}_scale_inv"] = values.flatten(2).flatten(0, 1), scale
    save_file(tensors, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (target / "config.json").write_text(json.dumps(config))
    return target


def write_dequantised(source: Path, target: Path) -> Path:
    """The model in `source` in float32, with the values that its weights have after they were quantised."""
    rm.without_weights(source, target)
    tensors = {}
    for file in source.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if QUANTISED.search(name):
                values, scales = quantize_rows(tensor)
                tensor = values.float() * scales
            tensors[name] = tensor.float()
    save_file(tensors, target / "model.safetensors")
    return target
