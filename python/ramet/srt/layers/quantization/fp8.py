"""Owns the arithmetic of fp8 weights: e4m3 values with a float32 scale for each output row, or for each block.

The scale of a row is taken over the whole row of the unsharded matrix, so that every sharding holds the same numbers.
"""

import torch

from ramet.srt.layers.quantization.scales import BlockScales

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


def dequantize(values: torch.Tensor, scales: torch.Tensor | BlockScales, dtype: torch.dtype) -> torch.Tensor:
    """values * scale in `dtype`, rounded once.

    Args:
        values: fp8 [num_rows, n].
        scales: float32 [num_rows, 1], or those of blocks.
    """
    if isinstance(scales, BlockScales):
        return dequantize_blocks(values, scales, dtype)
    return dequantize_rows(values, scales, dtype)


def dequantize_rows(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values * scale of each row in `dtype`, rounded once; see `quantize_rows`."""
    weight = torch.empty(values.shape, dtype=dtype, device=values.device)
    for rows in _row_blocks(values):
        weight[rows] = values[rows].float().mul_(scales[rows])
    return weight


def dequantize_blocks(values: torch.Tensor, scales: BlockScales, dtype: torch.dtype) -> torch.Tensor:
    """values * scale of each block in `dtype`, rounded once."""
    index = scales.blocks
    columns = torch.arange(index.first_column, index.first_column + values.shape[1], device=values.device)
    by_column = scales.values[:, columns // index.block_columns]  # [grid rows, n]
    weight = torch.empty(values.shape, dtype=dtype, device=values.device)
    for rows in _row_blocks(values):
        weight[rows] = values[rows].float().mul_(by_column[index.rows[rows]])
    return weight


def _row_blocks(values: torch.Tensor) -> list[slice]:
    num_rows = max(1, BLOCK_ELEMENTS[values.device.type] // max(1, values.shape[1]))
    return [slice(start, start + num_rows) for start in range(0, len(values), num_rows)]
