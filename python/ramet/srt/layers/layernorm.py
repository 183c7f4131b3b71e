"""Owns normalisation: by the root mean square, alone and fused with the residual addition before it, and of layers."""

import torch
import torch.nn.functional as F
from torch import nn

from ramet.srt.distributed.communication_op import tensor_model_parallel_all_reduce
from ramet.srt.layers.cpu_kernels import ops as cpu_ops
from ramet.srt.layers.cpu_kernels.ops import use_cpu_kernels
from ramet.srt.layers.kernels.runtime import use_kernels
from ramet.srt.layers.parameter import declare_weight, shard_box
from ramet.srt.layers.row_sums import RowSums, UnscaledRow


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
        if use_cpu_kernels(x, self.weight) and x.dim() == 2:
            return cpu_ops.rms_norm(x, self.weight, self.eps, offset=self.offset)
        if self.offset:
            weight = self.weight.float() + self.offset
            return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def add_and_norm(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual), both [num_tokens, size]. The sum may take residual's memory."""
        if use_kernels(x):
            from ramet.srt.layers.kernels.norm import rms_norm

            return rms_norm(x, self.weight, self.eps, residual, offset=self.offset), residual
        if use_cpu_kernels(x, self.weight, residual) and x.dim() == 2:
            return cpu_ops.rms_norm(x, self.weight, self.eps, residual, offset=self.offset), residual
        residual = x + residual
        return self.forward(residual), residual

    def begin(self, sums: RowSums, residual: torch.Tensor) -> UnscaledRow:
        """norm(sums + residual) but for its factor, by a kernel; the sum takes residual's memory."""
        from ramet.srt.layers.kernels.add_sums import add_sums

        return UnscaledRow(*add_sums(sums.parts, residual, self.weight, self.offset), self.eps)


class ShardedRMSNorm(RMSNorm):
    """The same over the columns of all ranks, of which each has a part: some heads of the queries, or of the keys.

    Args:
        columns: of this rank, of the `total` that the checkpoint has. Others may have them, too, if all have as many.
    """

    def __init__(
        self, total: int, columns: tuple[int, int], name: str, *, eps: float, offset: float, dtype: torch.dtype
    ):
        super().__init__(total, name, eps=eps, offset=offset, dtype=dtype)
        box = shard_box(f"{name}.weight", (total,), 0, *columns)
        self.weight = declare_weight((columns[1] - columns[0],), dtype, [box])

    def scaled(self, x: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
        """[num_tokens, columns of this rank], and [num_tokens, 1] over all ranks' columns -> the norm of x."""
        weight = self.weight.float() + self.offset
        return (x.float() * torch.rsqrt(mean_square + self.eps) * weight).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al., 2016)."""

    def __init__(self, size: int, name: str, *, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = declare_weight((size,), dtype, [shard_box(f"{name}.weight", (size,), 0, 0, size)])
        self.bias = declare_weight((size,), dtype, [shard_box(f"{name}.bias", (size,), 0, 0, size)])
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def norm_in_place(parts: list[torch.Tensor], norms: list[ShardedRMSNorm], tp_size: int) -> None:
    """Norm each part, [num_tokens, columns of this rank], over its columns on all ranks, which exchange one tensor."""
    if tp_size == 1:
        for part, norm in zip(parts, norms, strict=True):
            part.copy_(norm(part))
        return
    sums = torch.cat([part.float().square().mean(-1, keepdim=True) for part in parts], dim=-1)
    means = tensor_model_parallel_all_reduce(sums) / tp_size
    for part, norm, mean in zip(parts, norms, means.split(1, dim=-1), strict=True):
        part.copy_(norm.scaled(part, mean))
