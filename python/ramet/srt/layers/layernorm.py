"""Owns RMS normalisation, alone and fused with the residual addition before it."""

import torch
import torch.nn.functional as F
from torch import nn

from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.parameter import declare_weight, shard_box


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019), in float32 inside."""

    def __init__(self, size: int, name: str, *, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = declare_weight((size,), dtype, [shard_box(f"{name}.weight", (size,), 0, 0, size)])
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size]."""
        if use_kernels(x) and x.dim() == 2:
            from ramet.srt.layers.kernels.norm import rms_norm

            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def add_and_norm(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual), both [num_tokens, size]. The sum may take residual's memory."""
        if use_kernels(x):
            from ramet.srt.layers.kernels.norm import rms_norm

            return rms_norm(x, self.weight, self.eps, residual), residual
        residual = x + residual
        return self.forward(residual), residual
