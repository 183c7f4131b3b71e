"""Owns the description of the Responses routes' answers for the OpenAPI page, as http/answers.py that of the others."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ramet.srt.entrypoints.http.answers import Answer, ChatTokenLogprob

Status = Literal["in_progress", "completed", "incomplete"]


class InputTextPart(Answer):
    """A piece of text that went in."""

    type: Literal["input_text"]
    text: str


class OutputTextPart(Answer):
    """A piece of the answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatTokenLogprob] | None = None


class RefusalPart(Answer):
    """That a model did not want to answer: only in what was sent."""

    type: Literal["refusal"]
    refusal: str


class TextOfReasoning(Answer):
    """A piece of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class TextOfSummary(Answer):
    """A summary of reasoning: only in what was sent."""

    type: Literal["summary_text"]
    text: str


class ResponseMessage(Answer):
    """What somebody says."""

    id: str
    type: Literal["message"]
    status: Status
    role: Literal["user", "assistant", "system", "developer"]
    content: list[Annotated[InputTextPart | OutputTextPart | RefusalPart, Field(discriminator="type")]]


class ResponseReasoning(Answer):
    """What the model thinks before it says or calls something."""

    id: str
    type: Literal["reasoning"]
    status: Status | None = None
    summary: list[TextOfSummary]
    content: list[TextOfReasoning] | None = None
    encrypted_content: str | None = None


class ResponseFunctionCall(Answer):
    """A call of a function."""

    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


class ResponseFunctionCallOutput(Answer):
    """What a called function has answered."""

    id: str
    type: Literal["function_call_output"]
    status: Status
    call_id: str
    output: str | list[InputTextPart]


OutputItem = Annotated[ResponseMessage | ResponseReasoning | ResponseFunctionCall, Field(discriminator="type")]
ListedItem = Annotated[
    ResponseMessage | ResponseReasoning | ResponseFunctionCall | ResponseFunctionCallOutput,
    Field(discriminator="type"),
]


class ResponseFailure(Answer):
    """Why a response has failed."""

    code: str
    message: str


class IncompleteDetails(Answer):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"]


class InputTokensDetails(Answer):
    """Where the input's tokens came from."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Answer):
    """What the output's tokens are."""

    reasoning_tokens: int


class ResponseUsage(Answer):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseReasoningConfig(Answer):
    """How much was to be thought."""

    effort: str | None
    summary: None


class ResponseObject(Answer):
    """The answer of /v1/responses; the events of its stream have it, too."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ResponseReasoningConfig
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None


class InputItems(Answer):
    """A page of what a response has answered."""

    object: Literal["list"]
    data: list[ListedItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(Answer):
    """How many tokens a prompt has."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class DeletedResponse(Answer):
    """A response is forgotten."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]
