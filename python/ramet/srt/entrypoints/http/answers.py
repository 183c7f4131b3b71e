"""Owns the description of successful answers for the OpenAPI page. Answers are written without it, as plain dicts."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """A JSON object with exactly these fields."""

    model_config = ConfigDict(extra="forbid")


# ---- native ----


class NativeFinishReason(Answer):
    """Why an output ended."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    status_code: int | None = None


TokenLogprob = tuple[float | None, int, str | None]  # logprob, token id, text


class VersionSpan(Answer):
    """The output tokens [start, end) that one version of the weights has made."""

    version: str
    start: int
    end: int


class MetaInfo(Answer):
    """What is known about an output besides its text."""

    id: str
    finish_reason: NativeFinishReason | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float
    weight_version: str  # that has made the last token
    weight_versions: list[VersionSpan]  # in their order; several where the weights changed meanwhile
    lora_name: str | None = None  # of the adapter that has answered
    input_token_logprobs: list[TokenLogprob] | None = None
    output_token_logprobs: list[TokenLogprob] | None = None
    input_top_logprobs: list[list[TokenLogprob] | None] | None = None
    output_top_logprobs: list[list[TokenLogprob] | None] | None = None


class NativeOutput(Answer):
    """One output of /generate."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | None = None


class Tokenized(Answer):
    """The answer of /tokenize: lists of lists for several prompts."""

    tokens: list[int] | list[list[int]]
    count: int | list[int]
    max_model_len: int
    token_strs: list[str] | list[list[str]] | None


class Detokenized(Answer):
    """The answer of /detokenize: lists for several."""

    text: str | list[str]
    prompt: str | list[str]


# ---- OpenAI ----


class PromptLogprob(Answer):
    """A token that could have stood in a prompt, vLLM's way."""

    logprob: float
    rank: int  # in the whole vocabulary, 1 the likeliest
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class PromptTokensDetails(Answer):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class CompletionTokensDetails(Answer):
    """What output tokens were."""

    reasoning_tokens: int


class Usage(Answer):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CachedTokensDetails(Answer):
    """Where the prefix cache's tokens lay."""

    device: int
    host: int


class SglExt(Answer):
    """SGLang's extension; only where `return_cached_tokens_details` asks for it."""

    cached_tokens_details: CachedTokensDetails


class AnswerMetadata(Answer):
    """What has answered."""

    weight_version: str  # that has made the last token
    weight_versions: list[list[VersionSpan]] | None = None  # of each choice, where several versions had a part in them


class CompletionLogprobs(Answer):
    """Columns with one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One output."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"] | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Answer):
    """The answer of /v1/completions; in a stream the last event has `usage`, the others where it is asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    metadata: AnswerMetadata | None = None  # in a stream with the last event of a choice, of that choice
    sglext: SglExt | None = None


class ChatToken(Answer):
    """A token that could have stood here."""

    token: str
    logprob: float | None
    bytes: list[int]


class ChatTokenLogprob(ChatToken):
    """A token of the output."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(Answer):
    """Log-probabilities of the output's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None


class CalledFunctionAnswer(Answer):
    """A function, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallAnswer(Answer):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class ChatAnswerMessage(Answer):
    """What the model says, and what it thinks and calls where it does; no content where it only calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""  # only where there is some
    tool_calls: list[ToolCallAnswer] = []  # only where there are some


class ChatChoice(Answer):
    """One output."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "abort"]
    token_ids: list[int] | None = None


class ChatCompletion(Answer):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metadata: AnswerMetadata
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    sglext: SglExt | None = None


class ModelCard(Answer):
    """A model that can be named in requests."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    parent: str | None = None  # the model that an adapter is for


class ModelList(Answer):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


# ---- the rest ----


class Status(Answer):
    """How the instance is."""

    status: Literal["ready", "paused", "asleep", "awaiting_weights", "warming", "standby", "becoming", "serving"]


class SglangOutcome(Answer):
    """How a pause has begun or ended, in SGLang's words."""

    message: str
    status: Literal["ok"]


class PauseOutcome(Answer):
    """The same in vLLM's words."""

    status: Literal["paused", "resumed"]


class PauseState(Answer):
    """Whether generation is paused."""

    is_paused: bool


class SleepOutcome(Answer):
    """How an instance has fallen asleep; vLLM's `status` and `level`, and what it gave back."""

    status: Literal["sleeping"]
    level: int
    tags: list[str]
    num_bytes: int
    seconds: float


class WakeOutcome(Answer):
    """How it has woken, in the same way; `tags` are those that were asked for."""

    status: Literal["awake", "sleeping"]
    tags: list[str] | None
    missing: list[str]  # what is still given back
    source: str  # of the weights: host_memory, checkpoint, local_copy, …
    num_bytes: int
    seconds: float
    message: str  # why other instances can't take the weights now


class SleepState(Answer):
    """Whether the instance sleeps, and which memory is given back."""

    is_sleeping: bool
    tags: list[str]


class Version(Answer):
    """Which version of Ramet answers."""

    version: str


class ReplicaLoad(Answer):
    """What one replica has to do, as /get_load says it."""

    dp_rank: int
    num_reqs: int  # those that wait among them
    num_waiting_reqs: int
    num_tokens: int


class ReplicaLoads(Answer):
    """What one replica has to do, as /v1/loads says it."""

    dp_rank: int
    num_running_reqs: int
    num_waiting_reqs: int
    num_total_reqs: int
    num_used_tokens: int
    max_total_num_tokens: int
    token_usage: float
    gen_throughput: float
    utilization: float
    max_running_requests: int


class AllLoads(Answer):
    """The replicas together."""

    total_running_reqs: int
    total_waiting_reqs: int
    total_reqs: int
    total_used_tokens: int
    avg_token_usage: float
    avg_throughput: float
    avg_utilization: float


class Loads(Answer):
    """The answer of /v1/loads."""

    timestamp: str
    version: str
    dp_rank_count: int
    loads: list[ReplicaLoads]
    aggregate: AllLoads


class LoraOutcome(Answer):
    """What loading or unloading an adapter has done."""

    success: Literal[True]
    error_message: str
    loaded_adapters: dict[str, str]  # all of them: name -> path


class Done(Answer):
    """What an administrative call has done."""

    success: Literal[True]
    message: str


class ModelInfo(Answer):
    """What is served."""

    model_path: str
    served_model_name: str
    tokenizer_path: str
    is_generation: bool
    architecture: str
    dtype: str
    context_length: int
    vocab_size: int
    default_sampling_params: dict[str, float]  # of the model's own
    weight_version: str
