"""Owns every message that crosses a process boundary inside an instance, and their encoding (msgpack)."""

import msgspec

from ramet.srt.sampling.sampling_params import SamplingParams


class FinishReason(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Why a request ended. `type` is "stop", "length" or "abort"."""

    type: str
    matched: int | str | None = None  # the stop token id or stop string that ended it
    length: int | None = None  # for "length": the number of generated tokens
    message: str | None = None  # for "abort"
    status_code: int | None = None  # for "abort": the HTTP status the client gets


class TokenLogprobs(msgspec.Struct, kw_only=True, array_like=True):
    """Log-probabilities of consecutive tokens, from the raw model distribution (before temperature)."""

    logprobs: list[float | None]  # [num_tokens]; None for the first token of a prompt
    token_ids: list[int]  # [num_tokens]
    top_logprobs: list[list[float]]  # [num_tokens][top_logprobs_num]; empty lists when not asked for
    top_token_ids: list[list[int]]


class TokenizedGenerateReqInput(msgspec.Struct, kw_only=True, tag=True):
    """Tokenizer manager to scheduler: one sequence to generate."""

    rid: str
    input_ids: list[int]
    sampling_params: SamplingParams
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1  # -1: no prompt logprobs; k: from prompt position k
    top_logprobs_num: int = 0


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


class StartProfileReqInput(msgspec.Struct, kw_only=True, tag=True):
    """Record the passes of every rank. A replica's leader hands it on to its other ranks."""

    request_id: str
    profile_id: str  # the traces' names begin with it
    output_dir: str  # absolute; on the node of each rank
    num_steps: int | None  # passes; None: until StopProfileReqInput
    activities: list[str]  # "CPU", "GPU"
    with_stack: bool
    record_shapes: bool


class StopProfileReqInput(msgspec.Struct, kw_only=True, tag=True):
    """End the recording and write it. Handed on in the same way."""

    request_id: str


class ProfileReqOutput(msgspec.Struct, kw_only=True, tag=True):
    request_id: str
    success: bool
    message: str


class GetInternalStateReq(msgspec.Struct, kw_only=True, tag=True):
    """Ask the scheduler for the numbers that /get_server_info and /metrics show."""

    request_id: str


class PublisherStats(msgspec.Struct, kw_only=True):
    """What a rank's ModelExpress publisher has done so far."""

    status: str  # what the server was last told: "", "INITIALIZING", "READY" or "STALE"
    num_publishes: int = 0
    num_heartbeats: int = 0
    num_lost: int = 0  # times that the server had lost the record and it was published again
    num_failures: int = 0  # calls that failed
    last_error: str = ""  # of the last call; "" when it succeeded


class GetInternalStateReqOutput(msgspec.Struct, kw_only=True, tag=True):
    request_id: str
    num_running_reqs: int
    num_waiting_reqs: int
    num_used_tokens: int  # KV slots held by running requests
    num_cached_tokens: int  # KV slots held by the prefix cache alone
    max_total_num_tokens: int
    num_retracted_reqs: int  # total since the start
    last_gen_throughput: float  # output tokens per second over the last window
    modelexpress: PublisherStats | None = None  # of the rank that schedules, if it publishes its weights


class RequestOutput(msgspec.Struct, kw_only=True):
    """What one request gained since its last output."""

    rid: str
    token_ids: list[int]  # new output tokens
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int  # total so far
    cached_tokens: int
    input_logprobs: TokenLogprobs | None = None  # sent once, with the first output
    output_logprobs: TokenLogprobs | None = None  # of the new tokens


class BatchTokenIDOutput(msgspec.Struct, kw_only=True, tag=True):
    """Scheduler to detokenizer."""

    outputs: list[RequestOutput]


class DetokenizerRequest(msgspec.Struct, kw_only=True, tag=True):
    """Tokenizer manager to detokenizer, before the first output: how to turn this request's tokens into text."""

    rid: str
    prompt_tail_ids: list[int]  # last PROMPT_TAIL_TOKENS prompt tokens, as decoding context
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


class LoadReport(msgspec.Struct, kw_only=True):
    """How one rank's arena was filled."""

    source: str  # "checkpoint", "local_map", "local_copy", "transfer_engine", "nccl" or "dummy"; several joined by "+"
    num_bytes: int
    seconds: float
    verified: bool  # content checksums were compared with the seed's
    transfer_seconds: float = 0.0  # of `seconds`, those in which the bytes moved; 0 where it wasn't taken apart
    fallback_reason: str = ""  # why files were read where instances should have given the weights; empty otherwise
    # Who gave weights: addresses of seeds, or ModelExpress worker ids of their ranks; empty if all came from files.
    taken_from: tuple[str, ...] = ()
    taken_bytes: tuple[int, ...] = ()  # from each of them; what `num_bytes` has beyond these came from files


class WeightChecksumsReq(msgspec.Struct, kw_only=True, tag=True):
    """Main process to a rank: the checksums of slices of checkpoint tensors that are in its weights."""

    regions: list[tuple[str, tuple[tuple[int, int], ...]]]  # name of the tensor; (start, stop) per dimension


class WeightChecksumsOutput(msgspec.Struct, kw_only=True, tag=True):
    """A rank to the main process."""

    algorithm: str
    checksums: list[str]  # in the order of the regions


class InitSendGroupReq(msgspec.Struct, kw_only=True, tag=True):
    """Main process to a rank: meet a client's rank in a group of two.

    The name is the client's if it is of upstream's kind, which gets every parameter; otherwise the rank makes one.
    """

    port: int = 0  # where to listen; 0 takes a free one
    group_name: str = ""
    backend: str = ""  # "nccl" or "gloo"; empty: the one of the rank's device
    broadcasts: list[list[tuple[int, int, int, int]]] = []  # rows of the arena that each broadcast carries
    layout: str = ""  # digest of the layout that the rows are of
    timeout_s: float = 60.0  # for each step
    warm_up: bool = False  # send one byte before the broadcasts


class InitSendGroupOutput(msgspec.Struct, kw_only=True, tag=True):
    """A rank to the main process: where the client finds it."""

    transfer_id: str
    master_address: str
    port: int
    warm_up: bool = False  # whether one byte comes before the broadcasts


class SendWeightsReq(msgspec.Struct, kw_only=True, tag=True):
    """Main process to a rank: send what was agreed on; answered when it has been sent."""

    transfer_id: str


class SendWeightsOutput(msgspec.Struct, kw_only=True, tag=True):
    """A rank to the main process."""

    num_bytes: int
    seconds: float


class WeightControlError(msgspec.Struct, kw_only=True, tag=True):
    """A rank to the main process: why it does not do what it was asked to."""

    message: str


class InstanceReady(msgspec.Struct, kw_only=True, tag=True):
    """Main process to every rank that offers its weights: the instance is healthy, others may come."""


class InstanceStopping(msgspec.Struct, kw_only=True, tag=True):
    """Main process to every rank that offers its weights: the instance is about to end, nobody shall come any more."""


class InstanceStateOutput(msgspec.Struct, kw_only=True, tag=True):
    """A rank to the main process: it has noted the state of the instance, and told others if it could."""


WeightRequest = WeightChecksumsReq | InitSendGroupReq | SendWeightsReq | InstanceReady | InstanceStopping
WeightReply = WeightChecksumsOutput | InitSendGroupOutput | SendWeightsOutput | InstanceStateOutput | WeightControlError


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
    | StartProfileReqInput
    | StopProfileReqInput
    | ProfileReqOutput
    | GetInternalStateReq
    | GetInternalStateReqOutput
    | BatchTokenIDOutput
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
