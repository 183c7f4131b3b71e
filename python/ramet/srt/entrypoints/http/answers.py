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


class MetaInfo(Answer):
    """What is known about an output besides its text."""

    id: str
    finish_reason: NativeFinishReason | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float
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


# ---- OpenAI ----


class PromptTokensDetails(Answer):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class Usage(Answer):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


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


class Completion(Answer):
    """The answer of /v1/completions; as an event of a stream, the last one alone has `usage`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


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


class ChatAnswerMessage(Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    """One output."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "abort"]


class ChatCompletion(Answer):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(Answer):
    """A model that can be named in requests."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(Answer):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


# ---- the rest ----


class Status(Answer):
    """How the instance is."""

    status: Literal["ready"]


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
