"""Owns the gated activations of the MLP layers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def get_activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation that a config calls `name`.

    Raises:
        ValueError: if it is not known.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def act_and_mul(x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """[num_tokens, 2 * n] -> [num_tokens, n]: activation of the first half times the second half."""
    gate, up = x.chunk(2, dim=-1)
    return activation(gate).mul_(up)
