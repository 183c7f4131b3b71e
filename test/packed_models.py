"""Makes checkpoints of integers and of four-bit floats, and plain ones of what their numbers stand for.

Numbers are known before they are packed: nothing here unpacks, so that no mistake can be on both sides.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import random_models as rm
import torch
from fp8_models import QUANTISED, change_config
from ramet.srt.configs.quantization_readers import read_quantization
from ramet.srt.layers.parameter import declare_weight
from ramet.srt.layers.quantization.declare import declare_format
from ramet.srt.layers.quantization.weight import QuantizedWeight, weight_of
from ramet.srt.weights.manifest import WeightBox
from safetensors.torch import load_file, save_file

GROUP = 16  # columns that share a scale
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Parts = dict[str, torch.Tensor]  # the tensors of a matrix, by the ends of their names


@dataclass(frozen=True)
class Kind:
    """A format: how a matrix becomes tensors and what those stand for, and what the config says."""

    quantise: Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
    section: dict[str, Any]  # quantization_config
    left_out: str  # the key of modules that are not quantised
    file: dict[str, Any] | None = None  # hf_quant_config.json instead


def write(
    source: Path, folder: Path, kind: Kind, is_plain: Callable[[str], bool] = lambda name: False, **changes: Any
) -> tuple[Path, Path]:
    """The model in `source` in a format, in `folder`, and what it stands for in float32, in a folder beside it.

    Args:
        is_plain: which matrices stay as they are.
        changes: entries of what says how weights are quantised.
    """
    plain_folder = folder.with_name(f"{folder.name}-plain")
    tensors, plain, own = {}, {}, load_file(source / "model.safetensors")
    for name, tensor in own.items():
        plain[name] = tensor.float()
        if not QUANTISED.search(name) or is_plain(name):
            tensors[name] = tensor
            continue
        parts, plain[name] = kind.quantise(tensor.float())
        made = {name.removesuffix(".weight") + end: part.contiguous() for end, part in parts.items()}
        tensors |= {one: part for one, part in made.items() if one == name or one not in own}
    for target, content in ((folder, tensors), (plain_folder, plain)):
        rm.without_weights(source, target)
        save_file(content, target / "model.safetensors")
    change_config(plain_folder, dtype="float32")
    if kind.file is None:
        change_config(folder, quantization_config=kind.section | changes)
    else:
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": kind.file | changes}))
    return folder, plain_folder


def pack(numbers: torch.Tensor, bits: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """int32 words of unsigned numbers [n, m]; the one at `order[i]` of a word is the i-th from the lowest bits on."""
    per_word = 32 // bits
    words = torch.zeros(numbers.shape[0], numbers.shape[1] // per_word, dtype=torch.int64)
    for place in range(per_word):
        words |= numbers[:, order[place] :: per_word].long() << (bits * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def groups_of(matrix: torch.Tensor, group: int | None, *, in_any_order: bool = False) -> torch.Tensor:
    """The group of each column, None: one for all of them; each matrix has an order of its own, if any."""
    groups = torch.arange(matrix.shape[1]) // (group or matrix.shape[1])
    if not in_any_order:
        return groups
    generator = torch.Generator().manual_seed(int(matrix[0, 0].abs() * 1e6))
    return groups[torch.randperm(len(groups), generator=generator)]


@dataclass(frozen=True)
class Integers:
    """A matrix as unsigned numbers with scales and zeros for groups of columns."""

    numbers: torch.Tensor  # [rows, columns]
    scales: torch.Tensor  # [rows, groups]
    zeros: torch.Tensor  # the same
    groups: torch.Tensor  # [columns]

    @property
    def plain(self) -> torch.Tensor:
        return (self.numbers - self.zeros[:, self.groups]).float() * self.scales.float()[:, self.groups]


def to_integers(
    matrix: torch.Tensor, bits: int, groups: torch.Tensor, *, has_zeros: bool, dtype: torch.dtype = torch.float16
) -> Integers:
    """The matrix, rounded; zeros of any value, or in the middle."""
    num_groups, middle = int(groups.max()) + 1, 1 << (bits - 1)
    zeros = torch.full((len(matrix), num_groups), middle)
    if has_zeros:
        generator = torch.Generator().manual_seed(matrix.numel())
        zeros = torch.randint(1, 2 * middle, zeros.shape, generator=generator)
    largest = torch.stack([matrix[:, groups == group].abs().amax(dim=1) for group in range(num_groups)], dim=1)
    scales = (largest / (middle - 1)).to(dtype)
    numbers = (matrix / scales.float()[:, groups]).round().int() + zeros[:, groups]
    return Integers(numbers.clamp(0, 2 * middle - 1), scales, zeros, groups)


def ct_packed(
    bits: int = 4, *, has_zeros: bool = False, group: int | None = GROUP, actorder: str | None = None
) -> Kind:
    """compressed-tensors' pack-quantized, with bfloat16 scales."""

    def quantise(matrix: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        groups = groups_of(matrix, group, in_any_order=actorder == "group")
        made = to_integers(matrix, bits, groups, has_zeros=has_zeros, dtype=torch.bfloat16)
        parts = {".weight_packed": pack(made.numbers, bits), ".weight_scale": made.scales,
                 ".weight_shape": torch.tensor(matrix.shape)}  # fmt: skip
        if has_zeros:
            parts[".weight_zero_point"] = pack(made.zeros.T, bits).T
        if actorder == "group":
            parts[".weight_g_idx"] = groups.int()
        return parts, made.plain

    weights = {"num_bits": bits, "type": "int", "symmetric": not has_zeros, "group_size": group, "actorder": actorder}
    strategy = "group" if group else "channel"
    return Kind(quantise, compressed_tensors("pack-quantized", weights | {"strategy": strategy}), "ignore")


def ct_int8(strategy: str = "channel") -> Kind:
    """compressed-tensors' int-quantized; with activations of eight bits, which are not quantised here."""

    def quantise(matrix: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        largest = matrix.abs().amax(dim=1, keepdim=True) if strategy == "channel" else matrix.abs().max().view(1)
        scale = largest / 127
        values = (matrix / scale).round()
        return {".weight": values.to(torch.int8), ".weight_scale": scale}, values * scale

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    return Kind(quantise, compressed_tensors("int-quantized", weights, activations), "ignore")


def compressed_tensors(
    spelling: str, weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Its part of a config."""
    group = {"targets": ["Linear"], "weights": {"dynamic": False} | weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "format": spelling, "ignore": ["lm_head"],
            "config_groups": {"group_0": group}}  # fmt: skip


def gptq(bits: int = 4, *, group: int | None = GROUP, desc_act: bool = False, version: str = "gptq") -> Kind:
    """GPTQ's tools' format: the first version stores zeros less one."""

    def quantise(matrix: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        groups = groups_of(matrix, group, in_any_order=desc_act)
        made = to_integers(matrix, bits, groups, has_zeros=True)
        zeros = made.zeros - 1 if version == "gptq" else made.zeros
        parts = {".qweight": pack(made.numbers, bits).T, ".qzeros": pack(zeros.T, bits), ".scales": made.scales.T,
                 ".g_idx": groups.int(), ".bias": torch.zeros(len(matrix), dtype=torch.float16)}  # fmt: skip
        return parts, made.plain

    section = {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "desc_act": desc_act, "sym": False,
               "checkpoint_format": version, "damp_percent": 0.01, "lm_head": False}  # fmt: skip
    return Kind(quantise, section, "dynamic")


def awq(group: int | None = GROUP) -> Kind:
    """AutoAWQ's gemm format."""

    def quantise(matrix: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        made = to_integers(matrix, 4, groups_of(matrix, group), has_zeros=True)
        parts = {".qweight": pack(made.numbers.T, 4, AWQ_ORDER), ".qzeros": pack(made.zeros.T, 4, AWQ_ORDER),
                 ".scales": made.scales.T}  # fmt: skip
        return parts, made.plain

    section = {"quant_method": "awq", "bits": 4, "group_size": group or -1, "version": "gemm", "zero_point": True}
    return Kind(quantise, section, "modules_to_not_convert")


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # by their bits


def to_fp4(matrix: torch.Tensor, scales: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [rows, columns / 2], a pair of neighbours in each byte, and what they stand for with such scales."""
    spread = scales.repeat_interleave(group, 1)[:, : matrix.shape[1]]
    nearest = ((matrix / spread).abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    is_negative = matrix < 0
    bits = (nearest + 8 * is_negative).to(torch.uint8)
    return bits[:, ::2] | bits[:, 1::2] << 4, E2M1[nearest] * spread * torch.where(is_negative, -1.0, 1.0)


def largest_of_groups(matrix: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, groups], of which the last one may be smaller."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % group))
    return padded.abs().unflatten(1, (-1, group)).amax(dim=2)


def mxfp4() -> Kind:
    """compressed-tensors' format of a power of two for 32 columns."""

    def quantise(matrix: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        exponents = (largest_of_groups(matrix, 32) / 6).log2().ceil().clamp(min=-127)
        values, plain = to_fp4(matrix, torch.exp2(exponents), 32)
        return {".weight_packed": values, ".weight_scale": (exponents + 127).to(torch.uint8)}, plain

    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32,
               "scale_dtype": "torch.uint8"}  # fmt: skip
    return Kind(quantise, compressed_tensors("mxfp4-pack-quantized", weights), "ignore")


GPT_OSS = {  # as published
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def _quantise_stack(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[experts, columns, rows] as blocks and scales, and what those stand for."""
    quantised = [mxfp4().quantise(matrix.T.float()) for matrix in stack]
    blocks = torch.stack([parts[".weight_packed"] for parts, _ in quantised])
    scales = torch.stack([parts[".weight_scale"] for parts, _ in quantised])
    return blocks.unflatten(2, (-1, 16)), scales, torch.stack([plain.T for _, plain in quantised])


def write_gpt_oss(source: Path, folder: Path) -> tuple[Path, Path]:
    """A gpt-oss in the published form, and beside it in float32 what it stands for."""
    tensors, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"], plain[name] = _quantise_stack(tensor)
        else:
            tensors[name], plain[name] = tensor, tensor.float()
    plain_folder = folder.with_name(f"{folder.name}-plain")
    for target, content in ((folder, tensors), (plain_folder, plain)):
        rm.without_weights(source, target)
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, target / "model.safetensors")
    change_config(plain_folder, dtype="float32")
    change_config(folder, quantization_config=GPT_OSS)
    return folder, plain_folder


def nvfp4(tool: str) -> Kind:
    """Scales in e4m3 for 16 columns, times one for the matrix (modelopt), or divided by it (compressed-tensors)."""

    def quantise(matrix: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        largest = largest_of_groups(matrix, 16)
        outer = 448 * 6 / largest.max() if tool == "compressed-tensors" else largest.max() / (448 * 6)
        inner = (largest / 6 * outer if tool == "compressed-tensors" else largest / 6 / outer).to(torch.float8_e4m3fn)
        scales = inner.float() / outer if tool == "compressed-tensors" else inner.float() * outer
        values, plain = to_fp4(matrix, scales, 16)
        if tool == "compressed-tensors":
            return {".weight_packed": values, ".weight_scale": inner, ".weight_global_scale": outer.view(1),
                    ".input_global_scale": torch.ones(1)}, plain  # fmt: skip
        return {".weight": values, ".weight_scale": inner, ".weight_scale_2": outer,
                ".input_scale": torch.tensor(1.0)}, plain  # fmt: skip

    if tool == "modelopt":
        file = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
        return Kind(quantise, {}, "exclude_modules", file)
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    activations = weights | {"dynamic": "local"}
    return Kind(quantise, compressed_tensors("nvfp4-pack-quantized", weights, activations), "ignore")


def make_weight(
    kind: Kind, matrices: list[torch.Tensor], columns: tuple[int, int] | None = None
) -> tuple[QuantizedWeight, torch.Tensor]:
    """A stack of matrices as a layer holds it, and what it stands for, [num_matrices, rows, columns], in float32.

    The halves of each are matrices of their own in the checkpoint, as gate and up are.

    Args:
        columns: those that the rank has; all of them if None.
    """
    hf_config = {"quantization_config": kind.section} if kind.file is None else {}
    file = None if kind.file is None else {"quantization": kind.file}
    config = read_quantization(hf_config, file, "/models/m", None)
    assert config is not None
    num_rows, num_columns = matrices[0].shape
    start, stop = columns or (0, num_columns)
    boxes, tensors, plain = [], {}, []
    for place, matrix in enumerate(matrices):
        halves = []
        for half, part in enumerate(matrix.chunk(2)):
            name, rows = f"{place}.{half}", (half * len(part), (half + 1) * len(part))
            target = ((place, place + 1), rows, (0, stop - start))
            boxes.append(WeightBox(f"{name}.weight", ((0, len(part)), (start, stop)), target))
            parts, whole = kind.quantise(part)
            tensors |= {name + end: tensor for end, tensor in parts.items()}
            halves.append(whole[:, start:stop])
        plain.append(torch.cat(halves))
    layer = torch.nn.Module()
    shape = (len(matrices), num_rows, stop - start)
    layer.weight = declare_weight(shape, torch.float32, boxes, all_columns=num_columns)
    declare_format(layer, "weight", config.format, "cpu")
    for name, parameter in list(layer.named_parameters()):
        filled = torch.empty(parameter.shape, dtype=parameter.dtype)
        for box in parameter.boxes:
            target = filled[tuple(slice(*extent) for extent in box.target)]
            source = tensors[box.checkpoint_name]
            if source.numel() > 1:  # else one number for all rows
                source = source[tuple(slice(*extent) for extent in box.source)].reshape(target.shape)
            target.copy_(source.reshape(()) if source.numel() == 1 else source)
        setattr(layer, name, torch.nn.Parameter(filled, requires_grad=False))
    return weight_of(layer, "weight"), torch.stack(plain)
