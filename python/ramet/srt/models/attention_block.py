"""Owns what every kind of attention in a decoder layer does with its tokens, also where attention is data-parallel."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.distributed.communication_op import tensor_model_parallel_all_reduce
from ramet.srt.layers.linear import RowParallelLinear
from ramet.srt.layers.rotary_embedding import Rotation


class AttentionBlock(nn.Module, ABC):
    """The first half of a decoder layer."""

    o_proj: RowParallelLinear

    def forward(self, x: torch.Tensor, rotary: Rotation | None, forward_batch: ForwardBatch) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size]."""
        if forward_batch.attn_tokens is None:
            return self.o_proj(self._attend(x, rotary, forward_batch))
        # Data-parallel attention: each rank adds its part, of its own group's tokens and its own heads.
        output = torch.zeros_like(x)
        if forward_batch.batch_size > 0:
            own = forward_batch.attn_tokens
            output[own] = self.o_proj.partial(self._attend(x[own], rotary, forward_batch))
        return tensor_model_parallel_all_reduce(output)

    @abstractmethod
    def _attend(self, x: torch.Tensor, rotary: Rotation | None, forward_batch: ForwardBatch) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, columns of o_proj]."""
