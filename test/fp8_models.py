"""Makes fp8 checkpoints of several kinds, plain ones of the same values, and the parameters that ranks have of them."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import random_models as rm
import sharded_models as sm
import torch
from engine_harness import EngineHarness
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.weight_format import WHOLE, fp8_rows
from ramet.srt.layers.quantization.dequantize import dequantize
from ramet.srt.layers.quantization.fp8 import FP8, quantize_rows
from ramet.srt.layers.quantization.weight import GridIndex, QuantizedWeight, Weight, WeightLayout, weight_of
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.checkpoint.describe_model import describe_whole_model
from ramet.srt.model_loader.checkpoint.source import CheckpointSource
from ramet.srt.model_loader.checkpoint.whole_model import GRID_ATTRIBUTES
from safetensors.torch import load_file, save_file

QUANTISED = re.compile(r"((?<!\.weights)_proj|_proj_with_mqa|\.w[123]|\.wq_b|\.wk|\.in_proj_(qkvz|qkv|z))\.weight$")
MAX_FP8 = 448
_ACTIVATIONS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}


def load_model(folder: Path, parallel: ParallelConfig | None = None, quantization: str | None = None) -> Any:
    """One rank's model with its weights, as the engine loads them: checked against all of the model."""
    model = sm.build_model(folder, parallel or ParallelConfig(), quantization)
    load_arena(folder, model).bind(model)
    return model


def load_arena(folder: Path, model: Any, device: str = "cpu") -> WeightArena:
    """The weights of one rank's model."""
    manifest = sm.make_manifest(model)
    whole = describe_whole_model(model.config, manifest)
    return sm.load_from_disk(folder, manifest, lambda path: CheckpointSource(path, whole), device)


def load(folder: Path, parallel: ParallelConfig | None = None) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model of fp8 weights, from the files in a folder."""
    return dict(load_model(folder, parallel, "fp8").named_parameters())


def effective(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the model computes with: its parameters, fp8 ones times their scales, in float32."""
    result = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            weight = weight_of(module, name)
            if not isinstance(weight, QuantizedWeight):
                if not name.endswith((*GRID_ATTRIBUTES, "kv_scales")):  # those are of the cache
                    result[f"{path}.{name}"] = parameter.float()
            elif len(weight.shape) == 2:
                result[f"{path}.{name}"] = dequantize(weight, torch.float32)
            else:
                matrices = [dequantize(weight[expert], torch.float32) for expert in range(weight.shape[0])]
                result[f"{path}.{name}"] = torch.stack(matrices)
    return result


def fp8_weight(matrix: torch.Tensor) -> QuantizedWeight:
    """A matrix, or a stack of them, quantised by row."""
    values, scales = quantize_rows(matrix.flatten(0, -2))
    indices = {"values": GridIndex(None, 1, 0), "scales": GridIndex(None, WHOLE, 0)}
    layout = WeightLayout(fp8_rows(), *matrix.shape[-2:], indices)
    shape = (*matrix.shape[:-1], 1)
    return QuantizedWeight(layout, {"values": values.view(matrix.shape), "scales": scales.view(shape)})


def on_device(weight: Weight, device: str) -> Weight:
    """The same on another device."""
    if isinstance(weight, torch.Tensor):
        return weight.to(device)
    layout = weight.layout
    indices = {
        role: index if index.rows is None else index._replace(rows=index.rows.to(device))
        for role, index in layout.indices.items()
    }
    tensors = {role: tensor.to(device) for role, tensor in weight.tensors.items()}
    return QuantizedWeight(dataclasses.replace(layout, indices=indices), tensors)


def check_answers(folder: Path, plain: Path) -> None:
    """The engine's tokens and log-probabilities over a quantised model are transformers' over what it stands for."""
    prompts = rm.random_prompts([5, 40])
    results = EngineHarness(folder, device="cpu", dtype="float32").generate(
        prompts, max_new_tokens=4, logprob_start_len=0
    )
    sequences = [prompt + result.token_ids for prompt, result in zip(prompts, results, strict=True)]
    for prompt, result, logprobs in zip(prompts, results, rm.hf_logprobs(plain, sequences), strict=True):
        places = range(len(prompt) - 1, len(prompt) + 3)
        assert result.token_ids == [int(logprobs[place].argmax()) for place in places]
        expected = [float(logprobs[place, token]) for place, token in enumerate(prompt[1:])]
        assert result.input_logprobs is not None
        torch.testing.assert_close(result.input_logprobs.logprobs[1:], expected, atol=2e-4, rtol=0)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def write_fp8(
    source: Path,
    target: Path,
    kind: str,
    *,
    block: tuple[int, int] = (16, 16),
    scale_dtype: torch.dtype = torch.float32,
    is_plain: Callable[[str], bool] = lambda name: False,
    **changes: Any,
) -> Path:
    """The model in `source` as an fp8 checkpoint.

    Args:
        kind: "rows", "weights_only" (by row, too), "ct_tensor" and "ct_blocks" are compressed-tensors', "tensor" and
            "blocks" are of the method fp8, "mxfp8" of that method with exponents, "fbgemm_fp8" by row, "modelopt" has
            scales for whole matrices and names its method in hf_quant_config.json alone.
        scale_dtype: of block scales; powers of two for float8_e8m0fnu.
        is_plain: which matrices stay as they are.
        changes: entries of quantization_config.
    """
    rm.without_weights(source, target)
    tensors = {}
    for name, tensor in _tensors_of(source):
        if not QUANTISED.search(name) or is_plain(name):
            tensors[name] = tensor
        elif kind in ("rows", "weights_only", "fbgemm_fp8"):
            tensors[name], tensors[f"{name}_scale"] = quantize_rows(tensor)
        elif kind in ("tensor", "ct_tensor", "modelopt"):
            scale = tensor.float().abs().max() / MAX_FP8
            tensors[name], tensors[f"{name}_scale"] = (tensor.float() / scale).to(FP8), scale
            tensors[name.replace("weight", "input_scale")] = torch.tensor(1.0)
        else:
            suffix = "_scale" if kind == "ct_blocks" else "_scale_inv"
            dtype = torch.float8_e8m0fnu if kind == "mxfp8" else scale_dtype
            tensors[name], scale = quantize_blocks(tensor, block, dtype)
            tensors[name + suffix] = scale.view(torch.uint8) if kind == "mxfp8" else scale
    save_file(tensors, target / "model.safetensors")
    _write_config(target, kind, block, changes)
    return target


def _write_config(target: Path, kind: str, block: tuple[int, int], changes: dict[str, Any]) -> None:
    if kind == "modelopt":
        section = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]} | changes
        content = {"producer": {"name": "modelopt", "version": "0.0"}, "quantization": section}
        (target / "hf_quant_config.json").write_text(json.dumps(content))
        return
    if kind in ("mxfp8", "fbgemm_fp8"):
        section: dict[str, Any] = {"quant_method": kind}
    elif kind in ("rows", "weights_only", "ct_tensor", "ct_blocks"):
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}
        if kind == "ct_tensor":
            weights["strategy"] = "tensor"
        elif kind == "ct_blocks":
            weights |= {"strategy": "block", "block_structure": list(block)}
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None if kind == "weights_only" else _ACTIVATIONS,
        }
        section = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
                   "config_groups": {"group_0": group}, "kv_cache_scheme": None}  # fmt: skip
    else:
        section = {"quant_method": "fp8", "activation_scheme": "dynamic" if kind == "blocks" else "static"}
        if kind == "blocks":
            section |= {"weight_block_size": list(block), "fmt": "e4m3"}
    change_config(target, quantization_config=section | changes)


def change_config(folder: Path, **changes: Any) -> Path:
    """Set entries of a model's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def quantize_blocks(
    tensor: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 values, and the scales of blocks, of which the last ones may be smaller."""
    (rows, columns), (height, width) = tensor.shape, block
    padded = torch.nn.functional.pad(tensor.float(), (0, -columns % width, 0, -rows % height))
    blocks = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width))  # [block row, row, block column, column]
    scale = (blocks.abs().amax(dim=(1, 3)) / MAX_FP8).clamp(min=1e-12)
    if scale_dtype == torch.float8_e8m0fnu:
        scale = torch.exp2(scale.log2().ceil())
    scale = scale.to(scale_dtype)
    values = (blocks / scale.float()[:, None, :, None]).clamp(-MAX_FP8, MAX_FP8).to(FP8)
    return values.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scale


def write_dequantised(source: Path, target: Path) -> Path:
    """The model in `source` in float32, with the values that its weights have after they were quantised by row."""
    rm.without_weights(source, target)
    tensors = {}
    for name, tensor in _tensors_of(source):
        if QUANTISED.search(name):
            values, scales = quantize_rows(tensor)
            tensor = values.float() * scales
        tensors[name] = tensor.float()
    save_file(tensors, target / "model.safetensors")
    return target


def write_plain(source: Path, target: Path, block: tuple[int, int] = (16, 16)) -> Path:
    """The fp8 checkpoint in `source` in float32: every value times its scale."""
    rm.without_weights(source, target)
    (target / "hf_quant_config.json").unlink(missing_ok=True)
    change_config(target, quantization_config=None, dtype="float32")
    tensors, result = dict(_tensors_of(source)), {}
    for name, tensor in tensors.items():
        if tensor.dtype == FP8:
            scale = next(tensors[name + suffix] for suffix in ("_scale", "_scale_inv") if name + suffix in tensors)
            if scale.dtype == torch.uint8:
                scale = scale.view(torch.float8_e8m0fnu)
            result[name] = tensor.float() * _spread(scale.float(), tensor.shape, block)
        elif not name.endswith(("_scale", "_scale_inv")):
            result[name] = tensor.float()
    save_file(result, target / "model.safetensors")
    return target


def _spread(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    if scale.numel() == 1 or scale.shape == (shape[0], 1):
        return scale.reshape(-1, 1)
    return scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def _tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        yield from load_file(file).items()
