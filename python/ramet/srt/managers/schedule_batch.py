"""Owns a request as the scheduler sees it, waiting (`Req`) or running (`RunningReq`), and the batch of one pass."""

from dataclasses import dataclass, field

from ramet.srt.managers.io_struct import FinishReason, TokenizedGenerateReqInput, VersionStart
from ramet.srt.managers.logprobs import UnsentLogprobs
from ramet.srt.managers.request_grammar import RequestGrammar
from ramet.srt.mem_cache.request_cache import CacheHandle, CommonPrefix
from ramet.srt.text.incremental_decode import TextStream


class Req:
    """One sequence from the moment it can run to its last token: what it asks for, and what it has got.

    By itself it waits. While it runs, a `RunningReq` holds it.
    """

    def __init__(
        self,
        message: TokenizedGenerateReqInput,
        sampling_seed: int,
        group: int = 0,
        grammar: RequestGrammar | None = None,
    ):
        """
        Args:
            group: attention group whose ranks hold the request's KV cache whenever it runs.
            grammar: what its output must obey; None if that is free.
        """
        self.rid = message.rid
        self.origin_input_ids = message.input_ids
        self.sampling_params = message.sampling_params
        self.sampling_seed = sampling_seed
        self.group = group
        self.grammar = grammar
        self.stream = message.stream
        self.return_logprob = message.return_logprob
        self.logprob_start_len = message.logprob_start_len
        self.top_logprobs_num = message.top_logprobs_num
        self.pooling = message.pooling
        self.wants_input_logprobs = message.return_logprob and message.logprob_start_len >= 0
        self.priority = message.priority
        self.bad_words_ids = message.bad_words_ids
        self.lora_id = message.lora_id
        self.is_silent = False  # whether nobody waits for the output

        self.arrival_s: float | None = None  # when it came to wait, on the scheduler's clock
        self.waits_since_s = 0.0  # while it waits: when it came, or when its KV cache was taken away
        self.queue_time_s = 0.0  # how long it then waited until a pass first took some of it
        self.prefill_time_s = 0.0  # and from then on until its first token or its vector was there
        self.num_retractions = 0  # how often its KV cache was taken away
        self.output_ids: list[int] = []
        self.versions: list[VersionStart] = []  # of the weights that have made the output
        self.finish_reason: FinishReason | None = None  # None while the request goes on
        self.vector = b""  # what came of the pooling: float32
        self.ends_in_stop_token = False  # whether the last token is a stop token, whose text is no content
        self.cached_tokens = 0  # prompt tokens that came from the prefix cache when it first ran

        # Output that has not been sent yet
        self.num_sent_tokens = 0
        self.unsent_gaps_s: list[float] = []  # between its tokens and those before them
        self.token_s: float | None = None  # when the newest token came
        self.sent_s = 0.0  # when the newest token came of those that have been sent; before that, the first one
        self.num_sent_versions = 0
        self.logprobs = UnsentLogprobs(message)
        self.stop_stream: TextStream | None = None  # made with the first token of a request with stop strings

    @property
    def fill_ids(self) -> list[int]:
        """Prompt and output: what the KV cache holds, or must hold before the next token can be computed."""
        return self.origin_input_ids + self.output_ids if self.output_ids else self.origin_input_ids

    def token_ids(self, start: int, stop: int) -> list[int]:
        """A part of `fill_ids`, without making the rest."""
        split = len(self.origin_input_ids)
        if start >= split:
            return self.output_ids[start - split : stop - split]
        if stop <= split:
            return self.origin_input_ids[start:stop]
        return self.origin_input_ids[start:] + self.output_ids[: stop - split]

    def note_version(self, version: str) -> None:
        """What the request gets next, a token or a vector, comes from this version of the weights."""
        if not self.versions or self.versions[-1].version != version:
            self.versions.append(VersionStart(version, len(self.output_ids)))

    def note_token_time(self, now_s: float) -> None:
        """It has got a token just now."""
        if self.token_s is None:
            self.sent_s = now_s
        else:
            self.unsent_gaps_s.append(now_s - self.token_s)
        self.token_s = now_s

    def start_over(self) -> None:
        """Its KV cache has been taken away: what it has got stays, and all of its tokens are computed again."""
        self.num_retractions += 1
        if not self.output_ids:
            self.logprobs.forget_prompt()

    @property
    def has_run(self) -> bool:
        """Whether it has been computed before, if only in part."""
        return bool(self.output_ids or self.num_retractions)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output that are known."""
        return len(self.origin_input_ids) + len(self.output_ids)

    @property
    def max_prefix_len(self) -> int:
        """Tokens that may come from the prefix cache: the last one is computed, and so are those with logprobs."""
        if self.wants_input_logprobs and not self.output_ids:
            return min(len(self.origin_input_ids) - 1, max(0, self.logprob_start_len - 1))
        return self.num_tokens - 1


class RunningReq:
    """A request that holds KV cache: from its admission to its end, or until its cache is taken away."""

    __slots__ = ("extend_len", "group", "handle", "is_parked", "lora_slot", "num_pending", "prefix", "req")

    def __init__(self, req: Req, handle: CacheHandle):
        self.req = req
        self.handle = handle
        self.lora_slot = -1  # in which its adapter is while it runs; -1: it has none
        self.group = req.group
        self.extend_len = 0  # tokens that the pass in question computes
        self.prefix: CommonPrefix | None = None  # while it decodes: what the pass in question may read for several
        # Tokens that passes under way will give, or that the constraint has yet to take; a vector counts as one.
        self.num_pending = 0
        self.is_parked = False  # has given its KV cache back while its constraint takes a token

    @property
    def seq_len(self) -> int:
        """Tokens of prompt and output, those included that are not known yet."""
        req = self.req
        return len(req.origin_input_ids) + len(req.output_ids) + self.num_pending

    @property
    def missing_len(self) -> int:
        """Tokens that are to be computed before the next one can be chosen."""
        return self.seq_len - self.handle.kv_len

    @property
    def num_remaining_tokens(self) -> int:
        """Output tokens that may still come from further passes; below 0 where a pass under way gives one too many."""
        req = self.req
        if req.pooling is not None:
            return 0
        return req.sampling_params.max_new_tokens - len(req.output_ids) - self.num_pending

    @property
    def is_last_chunk(self) -> bool:
        """Whether this pass computes the sequence to its end, so that a token or a vector comes out."""
        return self.extend_len == self.missing_len

    def input_logprob_positions(self) -> range:
        """Prompt positions in this pass whose logits give a prompt logprob: that of the token behind each."""
        req = self.req
        if not req.wants_input_logprobs or req.output_ids:
            return range(0)
        start, stop = self.handle.kv_len, self.handle.kv_len + self.extend_len
        first = max(0, req.logprob_start_len - 1)
        return range(max(start, first), max(start, first, min(stop, len(req.origin_input_ids) - 1)))


@dataclass(slots=True)
class ScheduleBatch:
    """The requests of one forward pass, when it is made: later passes change what the requests say of themselves."""

    decoding: list[RunningReq]  # their newest token is computed
    chunks: list[RunningReq]  # `extend_len` tokens of each prompt are
    weight_version: str = ""  # by which the pass is computed
    reqs: list[RunningReq] = field(init=False)  # all, by attention group; in each, those that decode come first
    sampled_reqs: list[RunningReq] = field(init=False)  # those of `reqs` that get a token from this pass
    pooled_reqs: list[RunningReq] = field(init=False)  # those that get a vector
    num_prompt_tokens: int = field(init=False)  # of all chunks
    num_tokens: int = field(init=False)  # and those beside them

    def __post_init__(self) -> None:
        for running in self.decoding:
            running.extend_len = 1
        self.reqs = sorted([*self.decoding, *self.chunks], key=lambda running: running.group)
        cut = {running for running in self.chunks if not running.is_last_chunk}
        whole = [running for running in self.reqs if running not in cut]
        self.sampled_reqs = [running for running in whole if running.req.pooling is None]
        self.pooled_reqs = [running for running in whole if running.req.pooling is not None]
        self.num_prompt_tokens = sum(running.extend_len for running in self.chunks)
        self.num_tokens = self.num_prompt_tokens + len(self.decoding)
