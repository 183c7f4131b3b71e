"""Owns every message that crosses a process boundary inside an instance, and their encoding (msgpack)."""

from typing import Literal

import msgspec

from ramet.srt.batch.batch_plan import Pooling
from ramet.srt.lora.adapter import NO_ADAPTER, LoraAdapter, LoraSource
from ramet.srt.managers.prefix_messages import PrefixCopyOutput, PrefixCopyReq
from ramet.srt.sampling.sampling_params import SamplingParams
from ramet.srt.weights.inspection_messages import WeightInspection, WeightInspectionOutput
from ramet.srt.weights.memory_messages import MemoryStep
from ramet.srt.weights.report import LoadReport, PublisherStats
from ramet.srt.weights.update_messages import WeightStep, WeightStepOutput


class FinishReason(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Why a request ended. `type` is "stop", "length" or "abort"."""

    type: str
    matched: int | str | None = None  # the stop token id or stop string that ended it
    length: int | None = None  # for "length": the number of generated tokens
    message: str | None = None  # for "abort"
    status_code: int | None = None  # for "abort": the HTTP status the client gets
    param: str | None = None  # for "abort": the parameter that is to blame


class TokenLogprobs(msgspec.Struct, kw_only=True, array_like=True):
    """Log-probabilities of consecutive tokens, from the raw model distribution (before temperature)."""

    logprobs: list[float | None]  # [num_tokens]; None for the first token of a prompt
    token_ids: list[int]  # [num_tokens]
    top_logprobs: list[list[float]]  # [num_tokens][top_logprobs_num]; empty lists when not asked for
    top_token_ids: list[list[int]]
    ranks: list[int] = []  # [num_tokens] of a prompt: see LogprobRows; 0 for its first token


class TokenizedGenerateReqInput(msgspec.Struct, kw_only=True, tag=True):
    """Tokenizer manager to scheduler: one sequence to generate, or to pool."""

    rid: str
    input_ids: list[int]
    sampling_params: SamplingParams
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1  # -1: no prompt logprobs; k: from prompt position k
    top_logprobs_num: int = 0
    priority: int = 0
    bad_words_ids: list[list[int]] = []  # token sequences that the output must not have
    grammar_before: str = ""  # see Constraint.before
    pooling: Pooling | None = None  # nothing is generated then, and the sampling parameters mean nothing
    lora_name: str = ""  # of the adapter to compute it with; empty: none
    lora_id: int = NO_ADAPTER  # the number of that name's adapter, now: another one later has another number


class AbortReq(msgspec.Struct, kw_only=True, tag=True):
    """Tokenizer manager to scheduler: end one request, or all of them."""

    rid: str = ""
    abort_all: bool = False


class FlushCacheReqInput(msgspec.Struct, kw_only=True, tag=True):
    """Drop the prefix cache; refused while requests are running."""

    request_id: str


class FlushCacheReqOutput(msgspec.Struct, kw_only=True, tag=True):
    request_id: str
    success: bool
    message: str


PauseMode = Literal["abort", "retract", "in_place"]


class PauseReqInput(msgspec.Struct, kw_only=True, tag=True):
    """Plan no pass until ContinueReqInput. What becomes of the requests that are there, see Scheduler.pause."""

    request_id: str
    mode: PauseMode


class PauseReqOutput(msgspec.Struct, kw_only=True, tag=True):
    request_id: str
    num_held: int  # requests that wait for the end of the pause


class ContinueReqInput(msgspec.Struct, kw_only=True, tag=True):
    """End the pause, if there is one."""

    request_id: str


class ContinueReqOutput(msgspec.Struct, kw_only=True, tag=True):
    request_id: str


class RenameWeightsReqInput(msgspec.Struct, kw_only=True, tag=True):
    """Count what comes out from now on as of another version of the weights."""

    request_id: str
    version: str
    abort_all: bool  # end what runs and waits before


class RenameWeightsReqOutput(msgspec.Struct, kw_only=True, tag=True):
    request_id: str


class StartProfileReqInput(msgspec.Struct, kw_only=True, tag=True):
    """Record the passes of every rank. A replica's leader hands it on to its other ranks."""

    request_id: str
    profile_id: str  # the traces' names begin with it
    output_dir: str  # absolute; on the node of each rank
    num_steps: int | None  # passes; None: until StopProfileReqInput
    activities: list[str]  # "CPU", "GPU"
    with_stack: bool
    record_shapes: bool
    root: str = ""  # absolute; nothing is written outside of it, unless it is empty


class StopProfileReqInput(msgspec.Struct, kw_only=True, tag=True):
    """End the recording and write it. Handed on in the same way."""

    request_id: str


class ProfileReqOutput(msgspec.Struct, kw_only=True, tag=True):
    request_id: str
    success: bool
    message: str


class LoadLoraReqInput(msgspec.Struct, kw_only=True, tag=True):
    """Load an adapter. A replica's leader hands it on to its other ranks."""

    request_id: str
    lora_id: int  # above 0, and never used before
    adapter: LoraAdapter
    source: LoraSource
    pinned: bool = False  # once it is in a slot, it stays there


class FinishLoraReq(msgspec.Struct, kw_only=True, tag=True):
    """A replica's leader to its other ranks: find out together whether all of them have loaded an adapter."""

    lora_id: int


class UnloadLoraReqInput(msgspec.Struct, kw_only=True, tag=True):
    """Drop an adapter, which no request has any more. Handed on in the same way."""

    request_id: str
    lora_id: int


class LoraReqOutput(msgspec.Struct, kw_only=True, tag=True):
    request_id: str
    success: bool
    message: str  # why not


class GetInternalStateReq(msgspec.Struct, kw_only=True, tag=True):
    """Ask the scheduler for the numbers that /get_server_info and /metrics show."""

    request_id: str


class LinearStateStats(msgspec.Struct, frozen=True, kw_only=True):
    """What has become of the slots for states of linear layers."""

    num_slots: int
    num_used: int  # slots that running requests hold
    num_snapshots: int  # slots that hold the state of a cached prefix
    num_hits: int  # requests that began from a snapshot, since the start
    num_evictions: int  # snapshots that gave way to requests, newer ones or other pages, since the start


class GetInternalStateReqOutput(msgspec.Struct, kw_only=True, tag=True):
    request_id: str
    num_running_reqs: int
    num_waiting_reqs: int
    queue_oldest_s: float = 0.0  # seconds for which the one of them waits that has waited longest
    num_used_tokens: int  # KV slots held by running requests
    num_cached_tokens: int  # KV slots held by the prefix cache alone
    max_total_num_tokens: int
    num_retracted_reqs: int  # total since the start
    last_gen_throughput: float  # output tokens per second over the last window
    modelexpress: PublisherStats | None = None  # of the rank that schedules, if it publishes its weights
    num_given_bytes: int = 0  # of its weights, that others have taken piece by piece, in total
    linear_states: LinearStateStats | None = None  # of a model with linear layers


class VersionStart(msgspec.Struct, frozen=True, array_like=True):
    """From which of a request's output tokens on a version of the weights has made them."""

    version: str
    start: int


class RequestOutput(msgspec.Struct, kw_only=True):
    """What one request gained since its last output."""

    rid: str
    token_ids: list[int]  # new output tokens
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int  # total so far
    cached_tokens: int
    queue_time_s: float = 0.0  # seconds that it waited before any of it was computed
    prefill_time_s: float = 0.0  # and from then on until its first token was there; 0 before that
    input_logprobs: TokenLogprobs | None = None  # sent once, with the first output
    output_logprobs: TokenLogprobs | None = None  # of the new tokens
    gaps_s: list[float] = []  # seconds before each of the new tokens, since the one before it; the very first has none
    ends_in_stop_token: bool = False  # the last token only ends the request: its text is no part of the output's
    is_pooled: bool = False  # of a request with a pooling: there is no text to come
    vector: bytes = b""  # float32, of such a request when it has ended well
    new_versions: list[VersionStart] = []  # since its last output; the first comes with the first token, or the end


class BatchTokenIDOutput(msgspec.Struct, kw_only=True, tag=True):
    """Scheduler to detokenizer."""

    outputs: list[RequestOutput]


class BatchEmbeddingOutput(msgspec.Struct, kw_only=True, tag=True):
    """Scheduler to tokenizer manager: the outputs of pooled requests."""

    outputs: list[RequestOutput]


class DetokenizerRequest(msgspec.Struct, kw_only=True, tag=True):
    """Tokenizer manager to detokenizer, before the first output: how to turn this request's tokens into text."""

    rid: str
    prompt_tail_ids: list[int]  # the prompt's `prompt_tail`, as decoding context
    stop: list[str]
    min_new_tokens: int = 0  # a stop string counts from the next token on
    skip_special_tokens: bool = True
    no_stop_trim: bool = False


class RequestText(msgspec.Struct, kw_only=True):
    """A RequestOutput with the text its tokens added. Text that might become a stop string is held back."""

    text: str
    output: RequestOutput


class BatchStrOutput(msgspec.Struct, kw_only=True, tag=True):
    """Detokenizer to tokenizer manager."""

    outputs: list[RequestText]


class SchedulerReady(msgspec.Struct, kw_only=True, tag=True):
    """Scheduler to its launcher over the start-up pipe: the rank can serve."""

    world_rank: int
    max_total_num_tokens: int
    max_running_requests: int
    max_req_len: int  # longest prompt plus output, in tokens
    scheduler_addresses: list[str]  # of world rank 0: where the scheduler of each replica reads requests
    load_report: LoadReport
    phases: dict[str, float]  # start-up phase -> seconds since the launch of the instance


class DetokenizerReady(msgspec.Struct, kw_only=True, tag=True):
    """Detokenizer to its launcher over the start-up pipe: it can make text."""


class DetokenizerFailed(msgspec.Struct, kw_only=True, tag=True):
    """Detokenizer to its launcher over the start-up pipe: one line that says why it can't."""

    message: str


class SchedulerFailed(msgspec.Struct, kw_only=True, tag=True):
    """Scheduler to its launcher over the start-up pipe: one line that says why the rank can't serve."""

    world_rank: int
    message: str


Message = (
    TokenizedGenerateReqInput
    | AbortReq
    | FlushCacheReqInput
    | FlushCacheReqOutput
    | PauseReqInput
    | PauseReqOutput
    | ContinueReqInput
    | ContinueReqOutput
    | RenameWeightsReqInput
    | RenameWeightsReqOutput
    | StartProfileReqInput
    | StopProfileReqInput
    | ProfileReqOutput
    | LoadLoraReqInput
    | UnloadLoraReqInput
    | LoraReqOutput
    | WeightStep
    | MemoryStep
    | WeightStepOutput
    | WeightInspection
    | WeightInspectionOutput
    | GetInternalStateReq
    | GetInternalStateReqOutput
    | PrefixCopyReq
    | PrefixCopyOutput
    | BatchTokenIDOutput
    | BatchEmbeddingOutput
    | DetokenizerRequest
    | BatchStrOutput
    | SchedulerReady
    | SchedulerFailed
    | DetokenizerReady
    | DetokenizerFailed
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The message as msgpack bytes."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """The typed message in `data`.

    Raises:
        msgspec.DecodeError: if `data` is not one of the messages above.
    """
    return _decoder.decode(data)
