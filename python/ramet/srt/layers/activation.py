"""Owns the gated activations of the MLP layers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ramet.srt.configs.moe_config import ClampedGate
from ramet.srt.layers.cpu_kernels import ops as cpu_ops
from ramet.srt.layers.cpu_kernels.ops import use_cpu_kernels
from ramet.srt.layers.kernels.runtime import use_kernels


@dataclass(frozen=True)
class Activation:
    """An element-wise function and the name that configs give it."""

    name: str
    function: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def get_activation(name: str) -> Activation:
    """The activation that a config calls `name`.

    Raises:
        ValueError: if it is not known.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; known are {', '.join(_ACTIVATIONS)}")
    return Activation(name, _ACTIVATIONS[name])


def clamped_gate(y: torch.Tensor, clamp: ClampedGate) -> torch.Tensor:
    """[num_rows, 2 * n], of which the columns are gate and up in turns -> [num_rows, n]; see ClampedGate."""
    gate, up = y.unflatten(-1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
    return (gate * torch.sigmoid(clamp.alpha * gate)).mul_(up + 1)


def act_and_mul(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """[num_tokens, 2 * n] -> [num_tokens, n]: activation of the first half times the second half."""
    if use_kernels(x):
        from ramet.srt.layers.kernels import activation as kernel

        return kernel.act_and_mul(x, activation.name)
    if use_cpu_kernels(x):
        return cpu_ops.act_and_mul(x, activation.name)
    gate, up = x.chunk(2, dim=-1)
    return activation(gate).mul_(up)
