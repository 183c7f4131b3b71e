"""Owns what every kind of attention in a decoder layer does with its tokens, also where attention is data-parallel."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from ramet.srt.batch.forward_batch_info import ForwardBatch
from ramet.srt.distributed.communication_op import attention_all_reduce
from ramet.srt.layers.linear import RowParallelLinear
from ramet.srt.layers.rotary_embedding import Rotation


class AttentionBlock(nn.Module, ABC):
    """The first half of a decoder layer."""

    o_proj: RowParallelLinear

    def forward(self, x: torch.Tensor, rotary: Rotation | None, forward_batch: ForwardBatch) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, hidden_size], of this rank's own tokens."""
        y = self._attend(x, rotary, forward_batch)
        return self.o_proj(y) if forward_batch.group_sizes is None else attention_all_reduce(self.o_proj.partial(y))

    @abstractmethod
    def _attend(self, x: torch.Tensor, rotary: Rotation | None, forward_batch: ForwardBatch) -> torch.Tensor:
        """[num_tokens, hidden_size] -> [num_tokens, columns of o_proj]."""
