"""Owns fp8 weights: e4m3 values with one float32 scale for each output row, how layers declare and multiply them.

The scale of a row is taken over the whole row of the unsharded matrix, so that every sharding holds the same numbers.
"""

import torch
from torch import nn

from ramet.srt.layers.kernels.runtime import has_fp8_units, use_kernels
from ramet.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear, project
from ramet.srt.layers.moe import FusedMoE
from ramet.srt.layers.parameter import declare_weight
from ramet.srt.weights.manifest import WeightBox

FP8 = torch.float8_e4m3fn
MAX_FP8 = torch.finfo(FP8).max
MIN_SCALE = 1e-12  # of a row of zeros
MATRIX_ALIGNMENT = 16  # rows and columns that torch._scaled_mm takes
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # scaled at a time: 1 MB and 64 MB in float32


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_rows, n] -> fp8 of the same shape and float32 scales [num_rows, 1]: row = values * scale.

    The arithmetic is exact to the last bit on every device, so that all ranks and devices get equal weights.
    """
    x = x.float()
    # By a tensor: a division by a number is a multiplication with its rounded inverse on some devices.
    scales = (x.abs().amax(dim=1, keepdim=True) / x.new_full((1, 1), MAX_FP8)).clamp(min=MIN_SCALE)
    return (x / scales).to(FP8), scales


def dequantize_rows(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values * scale of each row in `dtype`, rounded once; see `quantize_rows`."""
    weight = torch.empty(values.shape, dtype=dtype, device=values.device)
    block_rows = max(1, BLOCK_ELEMENTS[values.device.type] // values.shape[1])
    for start in range(0, len(values), block_rows):
        rows = slice(start, start + block_rows)
        weight[rows] = values[rows].float().mul_(scales[rows])
    return weight


def declare_fp8(model: nn.Module) -> None:
    """Turn the weights of a model's linear layers and experts, on the meta device, into fp8 weights with scales.

    Embedding, output head, routers and norms keep their type.
    """
    for module in model.modules():
        if isinstance(module, MergedColumnParallelLinear | RowParallelLinear):
            _declare_quantised(module, "weight")
        elif isinstance(module, FusedMoE):
            _declare_quantised(module, "w13_weight")
            _declare_quantised(module, "w2_weight")


def _declare_quantised(module: nn.Module, name: str) -> None:
    """Make the weight `name`, [..., num_rows, n], fp8, with one scale for each row in `<name>_scale`."""
    weight = getattr(module, name)
    setattr(module, name, declare_weight(weight.shape, FP8, weight.boxes))
    one = ((0, 1),)
    boxes = [
        WeightBox(f"{box.checkpoint_name}_scale", box.source[:-1] + one, box.target[:-1] + one) for box in weight.boxes
    ]
    setattr(module, f"{name}_scale", declare_weight((*weight.shape[:-1], 1), torch.float32, boxes))


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b. On a GPU the rows of x are quantised too, and the matrix units multiply fp8.

    Args:
        x: [num_tokens, n].
        weight: fp8 [output_size, n], contiguous.
        scales: float32 [output_size, 1].
    """
    if not (use_kernels(x) and has_fp8_units(x.device)) or any(extent % MATRIX_ALIGNMENT for extent in weight.shape):
        # Scaled before the product: its sums with numbers up to 448 can be more than float16 holds.
        return project(x, dequantize_rows(weight, scales, x.dtype), bias)
    from ramet.srt.layers.kernels.fp8 import quantize_rows as quantize_on_gpu

    values, x_scales = quantize_on_gpu(x)
    y = torch._scaled_mm(values, weight.T, x_scales, scales.T, out_dtype=torch.bfloat16, use_fast_accum=True)
    y = y.to(x.dtype)
    return y if bias is None else y + bias
