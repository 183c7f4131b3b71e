"""Owns the tensors of one forward pass: what the scheduler decided, in the form that layers and backends read."""

from dataclasses import dataclass
from enum import Enum, auto

import torch


class ForwardMode(Enum):
    """What the pass computes: prompt tokens, or one new token for each sequence."""

    EXTEND = auto()
    DECODE = auto()


@dataclass
class ForwardBatch:
    """One forward pass over `batch_size` sequences, whose new tokens stand one behind the other.

    Whoever makes it sets all of it: the worker for prompts, `make_decode_batch` for decoding. Layers and backends only
    read it.
    """

    forward_mode: ForwardMode

    # What the model reads at its ends: all tokens of the pass.
    input_ids: torch.Tensor  # int64 [num_tokens]
    logits_rows: torch.Tensor  # int64 [num_logits]: the tokens whose logits are wanted

    # What attention reads: the tokens and sequences whose attention this rank computes, which are all unless attention
    # is data-parallel.
    positions: torch.Tensor  # int64 [num_tokens]
    out_cache_loc: torch.Tensor  # int64 [num_tokens]: KV slot of each new token
    block_tables: torch.Tensor  # int64 [batch_size, max_pages]: KV pages of each sequence, 0 where there is none
    seq_lens: torch.Tensor  # int32 [batch_size]: tokens in the cache after this pass

    # The same on the host, for what is planned there. In a captured pass, the most that a replay may have.
    seq_lens_cpu: list[int]
    extend_lens_cpu: list[int]  # new tokens of each sequence; all 1 when decoding

    # How the pass runs.
    attn_tokens: slice | None = None  # with data-parallel attention: the tokens of `input_ids` that attention is for
    is_captured: bool = False  # the pass is captured in a CUDA graph, or runs as it will be

    @property
    def batch_size(self) -> int:
        return len(self.seq_lens_cpu)
