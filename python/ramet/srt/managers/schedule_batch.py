"""Owns a running request (`Req`) and the batch that one forward pass computes (`ScheduleBatch`)."""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ramet.srt.batch.batch_plan import LAST_TOKEN, BatchPlan, PageWrite, SequencePlan
from ramet.srt.managers.io_struct import FinishReason, TokenizedGenerateReqInput, TokenLogprobs
from ramet.srt.mem_cache.request_cache import CacheHandle
from ramet.srt.sampling.sampling_state import SamplingState

if TYPE_CHECKING:
    from ramet.srt.sampling.grammar import Grammar
    from ramet.srt.text.incremental_decode import TextStream

logger = logging.getLogger(__name__)


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
        self.is_silent = False  # whether nobody waits for the output

        # Set by the scheduler while the request runs
        self.handle: CacheHandle | None = None
        self.extend_len = 0  # tokens that this pass computes
        self.cached_tokens = 0  # prompt tokens that came from the prefix cache
        self.group = 0  # attention group whose ranks hold the request's KV cache
        self.num_pending = 0  # tokens that passes under way will give

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
        """Tokens of prompt and output, those included that are not known yet."""
        return len(self.origin_input_ids) + len(self.output_ids) + self.num_pending

    @property
    def num_remaining_tokens(self) -> int:
        """Output tokens that may still come from further passes."""
        return self.sampling_params.max_new_tokens - len(self.output_ids) - self.num_pending

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

    def grammar_mask(self, vocab_size: int) -> bytes:
        """Which tokens the grammar allows next: one bit each, in int32 words; none if the grammar gave up."""
        words = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        try:
            self.grammar.fill_mask(words)
        except RuntimeError as error:  # a resource limit of the grammar library
            logger.warning("request %s: %s", self.rid, error)
            words[:] = 0
        return words.tobytes()

    def sampling_state(self) -> SamplingState:
        """What the sampling rank must know before it chooses this request's next token."""
        params = self.sampling_params
        return SamplingState(
            rid=self.rid,
            params=params,
            seed=self.sampling_seed,
            prompt_ids=self.origin_input_ids if params.repetition_penalty != 1.0 else [],
            output_ids=list(self.output_ids),
            return_logprob=self.return_logprob,
            top_logprobs_num=self.top_logprobs_num,
        )

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
    is_decode: bool
    sampled_reqs: list[Req] = field(default_factory=list)  # those that get a token from this pass

    @classmethod
    def for_extend(cls, reqs: list[Req]) -> "ScheduleBatch":
        """Compute `extend_len` prompt tokens of each request."""
        return cls(reqs, False, [req for req in reqs if req.is_last_chunk])

    @classmethod
    def for_decode(cls, reqs: list[Req]) -> "ScheduleBatch":
        """Compute the newest token of each request."""
        for req in reqs:
            req.extend_len = 1
        return cls(reqs, True, reqs)

    def to_plan(
        self, page_writes: list[PageWrite], new_states: list[SamplingState], ended_rids: list[str], vocab_size: int
    ) -> BatchPlan:
        """The pass as the ranks get it."""
        return BatchPlan(
            is_decode=self.is_decode,
            sequences=[self._sequence(req) for req in self.reqs],
            page_writes=page_writes,
            new_states=new_states,
            ended_rids=ended_rids,
            grammar_masks={
                req.rid: req.grammar_mask(vocab_size) for req in self.sampled_reqs if req.grammar is not None
            },
        )

    def _sequence(self, req: Req) -> SequencePlan:
        start = req.handle.kv_len
        if self.is_decode:
            token = LAST_TOKEN if req.num_pending else req.output_ids[-1]
            return SequencePlan(
                rid=req.rid, row=req.handle.row, group=req.group, start=start, input_ids=[token], is_sampled=True
            )
        positions = req.input_logprob_positions()
        return SequencePlan(
            rid=req.rid,
            row=req.handle.row,
            group=req.group,
            start=start,
            input_ids=req.fill_ids[start : start + req.extend_len],
            is_sampled=req.is_last_chunk,
            logprob_offset=positions.start - start if positions else 0,
            logprob_targets=req.origin_input_ids[positions.start + 1 : positions.stop + 1],
            top_logprobs_num=req.top_logprobs_num,
        )
