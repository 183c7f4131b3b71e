"""Owns the tensors of one forward pass: what the scheduler decided, in the form that layers and backends read."""

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ramet.srt.layers.attention.base_attn_backend import AttentionBackend
    from ramet.srt.mem_cache.memory_pool import MHATokenToKVPool


class ForwardMode(Enum):
    """What the pass computes: prompt tokens, or one new token for each sequence."""

    EXTEND = auto()
    DECODE = auto()


@dataclass
class ForwardBatch:
    """One forward pass over `batch_size` sequences, whose new tokens stand one behind the other."""

    forward_mode: ForwardMode

    # Set by the scheduler
    input_ids: torch.Tensor  # int64 [num_tokens]
    positions: torch.Tensor  # int64 [num_tokens]
    out_cache_loc: torch.Tensor  # int64 [num_tokens]: KV slot of each new token
    block_tables: torch.Tensor  # int64 [batch_size, max_pages]: KV pages of each sequence, 0 where there is none
    seq_lens: torch.Tensor  # int32 [batch_size]: tokens in the cache after this pass
    seq_lens_cpu: list[int]  # the same on the host
    extend_lens_cpu: list[int]  # new tokens of each sequence; all 1 when decoding
    logits_rows: torch.Tensor  # int64 [num_logits]: the tokens whose logits are wanted
    # With data-parallel attention: which tokens' attention this rank computes. What is said of sequences, positions
    # and cache slots above is then of these alone; `input_ids` and `logits_rows` are of all tokens.
    attn_tokens: slice | None = None
    # Set by the CUDA graph runner: the pass is captured, or runs as it will be. What is said of it on the host is then
    # the most that a replay may have.
    is_captured: bool = False

    # Set by the model runner, if not before
    kv_pool: "MHATokenToKVPool | None" = None
    attn_backend: "AttentionBackend | None" = None

    @property
    def batch_size(self) -> int:
        return len(self.seq_lens_cpu)
