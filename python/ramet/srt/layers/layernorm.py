"""Owns RMS normalisation, alone and fused with the residual addition before it."""

import torch
import torch.nn.functional as F
from torch import nn

from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.parameter import declare_weight, shard_box


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension, in float32 inside.

    (Zhang and Sennrich, 2019; Gemma's weights have an offset of 1.)
    """

    def __init__(self, size: int, name: str, *, eps: float, offset: float = 0.0, dtype: torch.dtype):
        super().__init__()
        self.weight = declare_weight((size,), dtype, [shard_box(f"{name}.weight", (size,), 0, 0, size)])
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size]."""
        if use_kernels(x) and x.dim() == 2:
            from ramet.srt.layers.kernels.norm import rms_norm

            return rms_norm(x, self.weight, self.eps, offset=self.offset)
        if self.offset:
            weight = self.weight.float() + self.offset
            return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def add_and_norm(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual), both [num_tokens, size]. The sum may take residual's memory."""
        if use_kernels(x):
            from ramet.srt.layers.kernels.norm import rms_norm

            return rms_norm(x, self.weight, self.eps, residual, offset=self.offset), residual
        residual = x + residual
        return self.forward(residual), residual
