"""Owns the gated MLP, and how it is split over tensor-parallel ranks."""

import torch
from torch import nn

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.layers.activation import get_activation
from ramet.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up as one matrix."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        prefix: str,
        *,
        bias: bool,
        activation: str,
        dtype: torch.dtype,
        parallel: ParallelConfig,
    ):
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size,
            [f"{prefix}.gate_proj", f"{prefix}.up_proj"],
            [intermediate_size, intermediate_size],
            bias=bias,
            dtype=dtype,
            parallel=parallel,
        )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, f"{prefix}.down_proj", bias=bias, dtype=dtype, parallel=parallel
        )
        self.activation = get_activation(activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size], the same on every rank."""
        return self.down_proj(self.gate_up_proj.gated(x, self.activation, self.down_proj))

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size]: what this rank adds to the sum."""
        return self.down_proj.partial(self.gate_up_proj.gated(x, self.activation, self.down_proj))
