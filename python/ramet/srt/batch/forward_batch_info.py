"""Owns the tensors of one forward pass: what the scheduler decided, in the form that layers and backends read."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import torch

from ramet.srt.batch.pass_tokens import PassTokens


class ForwardMode(Enum):
    """What the pass computes: any number of new tokens of each sequence, or one."""

    EXTEND = auto()
    DECODE = auto()


@dataclass
class ForwardBatch:
    """One forward pass over some sequences, whose new tokens stand one behind the other; see `make_forward_batch`.

    Layers and backends only read it. Unless attention is data-parallel, all tokens are this rank's own.
    """

    forward_mode: ForwardMode
    input_ids: torch.Tensor  # int64 [num_tokens]: all tokens of the pass
    positions: torch.Tensor  # int64 [num_tokens], of the own ones
    out_cache_loc: torch.Tensor  # int64 [num_tokens]: KV slot of each new token
    req_to_page: torch.Tensor  # int64 [num_rows, max_pages]: the KV pages of every request
    rows: torch.Tensor  # int64 [batch_size]: the row of each sequence there
    seq_lens: torch.Tensor  # int32 [batch_size]: tokens in the cache after this pass
    tokens: PassTokens  # the same on the host; in a captured pass, as long as a replay may have them
    is_long: torch.Tensor | None = None  # bool [num_tokens]: whose positions turn by the second set of frequencies
    lora_slots: np.ndarray | None = None  # int32 [num_tokens]: the adapter's slot of all tokens; None: none has one
    # With data-parallel attention: how many of `input_ids` are of each attention group, one group behind the other, and
    # which group this rank is in. All else is of this group's tokens.
    group_sizes: Sequence[int] | None = None
    own_group: int = 0
    # Where layers with a window have pages of their own, int64: the place of each page, the slot of each new token.
    window_map: torch.Tensor | None = None
    window_cache_loc: torch.Tensor | None = None
    state_slots: torch.Tensor | None = None  # int64 [num_rows]: where layers with a state keep that of each row
    is_captured: bool = False  # the pass is captured in a CUDA graph, or runs as it will be

    @property
    def batch_size(self) -> int:
        return len(self.tokens.rows)

    @property
    def seq_lens_cpu(self) -> list[int]:
        """`seq_lens`, on the host."""
        ends: list[int] = self.tokens.ends.tolist()
        return ends

    @property
    def extend_lens_cpu(self) -> list[int]:
        """New tokens of each sequence, on the host; all 1 when decoding."""
        lens: list[int] = self.tokens.lens.tolist()
        return lens

    def of_windows(self, page_size: int) -> "ForwardBatch":
        """The same pass as layers with a sliding window see it: their pages and slots."""
        if self.window_map is None:
            return self
        num_pages = -(-max(self.seq_lens_cpu, default=0) // page_size)
        assert self.window_cache_loc is not None
        table = self.window_map[self.req_to_page[:, :num_pages]]
        return dataclasses.replace(self, req_to_page=table, out_cache_loc=self.window_cache_loc, window_map=None)

    def block_tables(self, page_size: int) -> torch.Tensor:
        """int64 [batch_size, max_pages]: the KV pages of each sequence, as many as the longest one has."""
        num_pages = -(-max(self.seq_lens_cpu, default=0) // page_size)
        return self.req_to_page[:, :num_pages].index_select(0, self.rows)
