"""Owns the quantisation of weights to fp8: e4m3 values with a float32 scale for each output row.

The scale of a row is taken over the whole row of the unsharded matrix, so that every sharding holds the same numbers.
"""

import torch

FP8 = torch.float8_e4m3fn
MAX_FP8 = torch.finfo(FP8).max
MIN_SCALE = 1e-12  # of a row of zeros


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_rows, n] -> fp8 of the same shape and float32 scales [num_rows, 1]: row = values * scale.

    The arithmetic is exact to the last bit on every device, so that all ranks and devices get equal weights.
    """
    x = x.float()
    # By a tensor: a division by a number is a multiplication with its rounded inverse on some devices.
    scales = (x.abs().amax(dim=1, keepdim=True) / x.new_full((1, 1), MAX_FP8)).clamp(min=MIN_SCALE)
    return (x / scales).to(FP8), scales
