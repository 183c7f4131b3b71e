"""Owns the token embedding and the output head, split over tensor-parallel ranks by vocabulary rows."""

import torch
import torch.nn.functional as F
from torch import nn

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.distributed.communication_op import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from ramet.srt.layers.matmul import project
from ramet.srt.layers.parameter import declare_weight, shard_box

VOCAB_PADDING = 64  # rows; SGLang pads to the same multiple, so that the tensors of both have one size


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the table over all ranks: a multiple of 64 that splits evenly."""
    padded = -(-vocab_size // VOCAB_PADDING) * VOCAB_PADDING
    return -(-padded // tp_size) * tp_size


class VocabParallelEmbedding(nn.Module):
    """Rows of the token table; rows beyond the vocabulary are zero."""

    def __init__(self, vocab_size: int, hidden_size: int, name: str, *, dtype: torch.dtype, parallel: ParallelConfig):
        super().__init__()
        rows = padded_vocab_size(vocab_size, parallel.tp_size) // parallel.tp_size
        self.vocab_size = vocab_size
        self.start = parallel.tp_rank * rows
        self.stop = min(self.start + rows, vocab_size)
        boxes = []
        if self.start < self.stop:
            boxes.append(shard_box(f"{name}.weight", (vocab_size, hidden_size), 0, self.start, self.stop))
        self.weight = declare_weight((rows, hidden_size), dtype, boxes)  # [rows of this rank, hidden_size]
        self.tp_size = parallel.tp_size

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] int64 -> [num_tokens, hidden_size]."""
        x = self.partial(input_ids)
        return x if self.tp_size == 1 else tensor_model_parallel_all_reduce(x)

    def partial(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] int64 -> [num_tokens, hidden_size]: what this rank adds to the sum."""
        if self.tp_size == 1:
            return F.embedding(input_ids, self.weight)
        outside = (input_ids < self.start) | (input_ids >= self.stop)
        embedded = F.embedding((input_ids - self.start).masked_fill(outside, 0), self.weight)
        return embedded.masked_fill(outside.unsqueeze(-1), 0)


class ParallelLMHead(VocabParallelEmbedding):
    """The output head: hidden states to logits. Its table may be the embedding's (tied)."""

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> float32 [num_tokens, vocab_size], the same on every rank."""
        logits = tensor_model_parallel_all_gather(project(hidden_states, self.weight))
        return logits[:, : self.vocab_size].float()
