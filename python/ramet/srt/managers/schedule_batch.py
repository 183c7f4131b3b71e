"""Owns a running request (`Req`) and the batch that one forward pass computes (`ScheduleBatch`)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ramet.srt.managers.io_struct import FinishReason, TokenizedGenerateReqInput, TokenLogprobs
from ramet.srt.mem_cache.request_cache import CacheHandle
from ramet.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

if TYPE_CHECKING:
    from ramet.srt.mem_cache.memory_pool import ReqToPagePool
    from ramet.srt.sampling.grammar import Grammar
    from ramet.srt.utils.incremental_decode import TextStream


def empty_logprobs() -> TokenLogprobs:
    return TokenLogprobs(logprobs=[], token_ids=[], top_logprobs=[], top_token_ids=[])


class Req:
    """One sequence from its arrival to its last token."""

    def __init__(self, message: TokenizedGenerateReqInput, sampling_seed: int):
        self.rid = message.rid
        self.origin_input_ids = message.input_ids
        self.sampling_params = message.sampling_params
        self.sampling_seed = sampling_seed
        self.stream = message.stream
        self.return_logprob = message.return_logprob
        self.logprob_start_len = message.logprob_start_len
        self.top_logprobs_num = message.top_logprobs_num
        self.output_ids: list[int] = []
        self.grammar: Grammar | None = None
        self.finish_reason: FinishReason | None = None
        self.abort_requested = False

        # Set by the scheduler while the request runs
        self.handle: CacheHandle | None = None
        self.extend_len = 0  # tokens that this pass computes
        self.cached_tokens = 0  # prompt tokens that came from the prefix cache
        self.token_counts: torch.Tensor | None = None  # float32 [vocab_size]: output tokens, for penalties
        self.seen_tokens: torch.Tensor | None = None  # bool [vocab_size]: prompt and output tokens, for penalties

        self.stop_stream: TextStream | None = None  # made for requests with stop strings

        # Output that has not been sent yet
        self.num_sent_tokens = 0
        self.input_logprobs = empty_logprobs() if self.wants_input_logprobs else None
        self.output_logprobs = empty_logprobs() if self.return_logprob else None

    @property
    def wants_input_logprobs(self) -> bool:
        return self.return_logprob and self.logprob_start_len >= 0

    @property
    def fill_ids(self) -> list[int]:
        """Prompt and output: what the KV cache holds, or must hold before the next token can be computed."""
        return self.origin_input_ids + self.output_ids

    @property
    def seq_len(self) -> int:
        return len(self.origin_input_ids) + len(self.output_ids)

    @property
    def num_remaining_tokens(self) -> int:
        """Output tokens that may still come."""
        return self.sampling_params.max_new_tokens - len(self.output_ids)

    @property
    def max_prefix_len(self) -> int:
        """Tokens that may come from the prefix cache: the last one is computed, and so are those with logprobs."""
        if self.wants_input_logprobs and not self.output_ids:
            return min(len(self.origin_input_ids) - 1, max(0, self.logprob_start_len - 1))
        return self.seq_len - 1

    @property
    def is_last_chunk(self) -> bool:
        """Whether this pass computes the sequence to its end, so that a token comes out."""
        return self.handle.kv_len + self.extend_len == self.seq_len

    def input_logprob_positions(self) -> range:
        """Prompt positions in this pass whose logits give a prompt logprob: that of the token behind each."""
        if not self.wants_input_logprobs or self.output_ids:
            return range(0)
        start, stop = self.handle.kv_len, self.handle.kv_len + self.extend_len
        first = max(0, self.logprob_start_len - 1)
        return range(max(start, first), max(start, first, min(stop, len(self.origin_input_ids) - 1)))


@dataclass
class ScheduleBatch:
    """The requests of one forward pass."""

    reqs: list[Req]
    forward_mode: ForwardMode
    sampled_reqs: list[Req] = field(default_factory=list)  # those that get a token from this pass

    @classmethod
    def for_extend(cls, reqs: list[Req]) -> "ScheduleBatch":
        """Compute `extend_len` prompt tokens of each request."""
        return cls(reqs, ForwardMode.EXTEND, [req for req in reqs if req.is_last_chunk])

    @classmethod
    def for_decode(cls, reqs: list[Req]) -> "ScheduleBatch":
        """Compute the newest token of each request."""
        for req in reqs:
            req.extend_len = 1
        return cls(reqs, ForwardMode.DECODE, reqs)

    def to_forward_batch(self, req_pool: "ReqToPagePool", page_size: int) -> ForwardBatch:
        """The batch as tensors on the pool's device."""
        device = req_pool.req_to_page.device
        starts = [req.handle.kv_len for req in self.reqs]
        lens = [req.extend_len for req in self.reqs]
        ends = [start + new for start, new in zip(starts, lens, strict=True)]
        if self.forward_mode is ForwardMode.DECODE:
            input_ids = [req.output_ids[-1] for req in self.reqs]
            positions = torch.tensor(starts, dtype=torch.int64, device=device)
            sequence = torch.arange(len(self.reqs), device=device)
            logits_rows = sequence
        else:
            input_ids, rows = [], []
            for req, start, end in zip(self.reqs, starts, ends, strict=True):
                input_ids.extend(req.fill_ids[start:end])
                if req.is_last_chunk:
                    rows.append(len(input_ids) - 1)
            positions = torch.cat(
                [torch.arange(start, end, device=device) for start, end in zip(starts, ends, strict=True)]
            )
            sequence = torch.repeat_interleave(
                torch.arange(len(self.reqs), device=device), torch.tensor(lens, device=device)
            )
            logits_rows = torch.tensor(rows, dtype=torch.int64, device=device)
        max_pages = -(-max(ends) // page_size)
        table_rows = torch.tensor([req.handle.row for req in self.reqs], dtype=torch.int64, device=device)
        block_tables = req_pool.req_to_page[table_rows, :max_pages]
        pages = block_tables[sequence, positions // page_size]
        return ForwardBatch(
            forward_mode=self.forward_mode,
            input_ids=torch.tensor(input_ids, dtype=torch.int64, device=device),
            positions=positions,
            out_cache_loc=pages * page_size + positions % page_size,
            block_tables=block_tables,
            seq_lens=torch.tensor(ends, dtype=torch.int32, device=device),
            seq_lens_cpu=ends,
            extend_lens_cpu=lens,
            logits_rows=logits_rows,
        )
