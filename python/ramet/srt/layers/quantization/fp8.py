"""Owns fp8 weights: e4m3 values with one float32 scale for each output row, how layers declare and multiply them.

The scale of a row is taken over the whole row of the unsharded matrix, so that every sharding holds the same numbers.
"""

import torch
from torch import nn

from ramet.srt.layers.parameter import declare_weight
from ramet.srt.weights.manifest import WeightBox

FP8 = torch.float8_e4m3fn
MAX_FP8 = torch.finfo(FP8).max
MIN_SCALE = 1e-12  # of a row of zeros
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
    """Turn the weights that a model's layers name in `quantisable_weights`, on the meta device, into fp8 with scales.

    Embedding, output head, routers and norms name none and keep their type.
    """
    for module in model.modules():
        for name in getattr(module, "quantisable_weights", ()):
            _declare_quantised(module, name)


def _declare_quantised(module: nn.Module, name: str) -> None:
    """Make the weight `name`, [..., num_rows, n], fp8, with one scale for each row in `<name>_scale`."""
    weight = getattr(module, name)
    setattr(module, name, declare_weight(weight.shape, FP8, weight.boxes))
    one = ((0, 1),)
    boxes = [
        WeightBox(f"{box.checkpoint_name}_scale", box.source[:-1] + one, box.target[:-1] + one) for box in weight.boxes
    ]
    setattr(module, f"{name}_scale", declare_weight((*weight.shape[:-1], 1), torch.float32, boxes))
