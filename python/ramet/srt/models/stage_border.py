"""Owns what goes from one pipeline stage to the next: hidden states, and behind them what a sparse index has chosen.

That is where the first layers of the next stage have no index of their own.
"""

import torch
from torch import nn

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.layers.attention.radix_attention import RadixAttention
from ramet.srt.layers.attention.sparse_backend import SparseBackend


def choice_columns(layer: nn.Module, forward_batch: ForwardBatch) -> int:
    """Columns of the choice of a pass, in the model's type; 0 if it needs none, which both stages know.

    Args:
        layer: of this stage.
    """
    backend = _backend(layer)
    if forward_batch.batch_size == 0 or not backend.begin_pass(forward_batch):
        return 0
    return backend.index.top_k * torch.int32.itemsize // backend.spec.dtype.itemsize


def with_choice(x: torch.Tensor, layer: nn.Module, forward_batch: ForwardBatch) -> torch.Tensor:
    """Hidden states [num_tokens, hidden_size] -> the same with the choice behind them, bit by bit."""
    if choice_columns(layer, forward_batch) == 0:
        return x
    return torch.cat([x, _backend(layer).chosen.view(x.dtype)], dim=-1)


def take_choice(x: torch.Tensor, hidden_size: int, layer: nn.Module) -> torch.Tensor:
    """What another stage has sent -> the hidden states; the backend has the choice from then on."""
    if x.shape[1] > hidden_size:
        choice = x[:, hidden_size:].contiguous()
        _backend(layer).chosen = choice.view(torch.int32)
    return x[:, :hidden_size].contiguous()


def _backend(layer: nn.Module) -> SparseBackend:
    backend = next(module.backend for module in layer.modules() if isinstance(module, RadixAttention))
    assert isinstance(backend, SparseBackend), "only models with an index have such borders"
    return backend
