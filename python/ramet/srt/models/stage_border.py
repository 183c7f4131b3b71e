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
    num_columns = choice_columns(layer, forward_batch)
    if num_columns == 0:
        return x
    choice = x.new_zeros((len(x), num_columns))
    choice[_own(forward_batch)] = _backend(layer).chosen.view(x.dtype)
    return torch.cat([x, choice], dim=-1)


def take_choice(x: torch.Tensor, hidden_size: int, layer: nn.Module, forward_batch: ForwardBatch) -> torch.Tensor:
    """What another stage has sent -> the hidden states; the backend has the choice from then on."""
    if x.shape[1] > hidden_size:
        choice = x[_own(forward_batch), hidden_size:].contiguous()
        _backend(layer).chosen = choice.view(torch.int32)
    return x[:, :hidden_size].contiguous()


def _own(forward_batch: ForwardBatch) -> slice:
    """The tokens that attention is for."""
    return slice(None) if forward_batch.attn_tokens is None else forward_batch.attn_tokens


def _backend(layer: nn.Module) -> SparseBackend:
    backend = next(module.backend for module in layer.modules() if isinstance(module, RadixAttention))
    assert isinstance(backend, SparseBackend), "only models with an index have such borders"
    return backend
