"""Owns the bodies of the OpenAI routes: their fields, types and ranges. What is not here is refused by name."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from ramet.srt.entrypoints.http.http_validation import Prompts, PromptText, RequestBody, Text, TokenIds
from ramet.srt.sampling.sampling_params import MAX_LOGIT_BIAS, MAX_SEED, MAX_SEQUENCES, MAX_TOKENS, TOKEN_KEY

MAX_OPENAI_LOGPROBS = 20
MAX_METADATA = 64
MAX_TOOL_CALLS = 256


def at_most(max_entries: int) -> Callable[[Any], Any]:
    """A check that comes before that of each entry, of which pydantic would tell one error each."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > max_entries:
            raise ValueError(f"at most {max_entries} entries are taken, not {len(value)}")
        return value

    return check


StopText = Annotated[str, Field(min_length=1, max_length=4096)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=TOKEN_KEY)], Bias],
    BeforeValidator(at_most(MAX_LOGIT_BIAS)),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": TOKEN_KEY},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        }
    ),
]
TokenLimit = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


def only_with(option: str, switch: str) -> dict[str, Any]:
    """JSON schema: `option` may be given (and not null) only where `switch` is true."""
    return {
        "if": {"required": [option], "properties": {option: {"not": {"type": "null"}}}},
        "then": {"required": [switch], "properties": {switch: {"const": True}}},
    }


class StreamOptions(RequestBody):
    """Only with `stream`."""

    include_usage: bool = False


class SamplingBody(RequestBody):
    """What both OpenAI routes have: OpenAI's own parameters, then those that SGLang adds to them.

    Where None is the default of a number, the model's own default counts, and else that of /generate.
    """

    model: Text
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = 1
    max_tokens: TokenLimit | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=64, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    frequency_penalty: Penalty | None = 0.0
    presence_penalty: Penalty | None = 0.0
    logit_bias: LogitBias | None = None
    # What clients send about themselves; nothing here depends on it.
    user: Text | None = None
    metadata: (
        Annotated[dict[Text, Text], BeforeValidator(at_most(MAX_METADATA)), Field(max_length=MAX_METADATA)] | None
    ) = None
    store: Literal[False] | None = None

    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = 0
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKENS)]], Field(max_length=1024, fail_fast=True)] | None
    ) = None
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    no_stop_trim: bool | None = False
    regex: Text | None = None
    ebnf: Text | None = None


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    model_config = ConfigDict(json_schema_extra=only_with("stream_options", "stream"))

    prompt: PromptText | Prompts[PromptText] | TokenIds | Prompts[TokenIds]
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_OPENAI_LOGPROBS)] | None = None
    json_schema: Text | dict[str, Any] | None = None


class TextPart(RequestBody):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Text


MessageContent = Text | Prompts[TextPart]


class SystemMessage(RequestBody):
    """Instructions; "developer" is OpenAI's newer word for the same."""

    role: Literal["system", "developer"]
    content: MessageContent
    name: Text | None = None


class UserMessage(RequestBody):
    """What the person says."""

    role: Literal["user"]
    content: MessageContent
    name: Text | None = None


class CalledFunction(RequestBody):
    """A function that the model has called, with its arguments: a JSON object, as text or as it is."""

    name: Text
    arguments: Text | dict[str, Any] = ""


class ToolCall(RequestBody):
    """A call that the model has made."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(RequestBody):
    """What the model has said. The empty fields are those of our own answers, which clients send back."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
                {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
            ]
        }
    )

    role: Literal["assistant"]
    content: MessageContent | None = None
    name: Text | None = None
    refusal: None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None  # another name for it
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message needs a content or tool_calls")
        return self


class ToolMessage(RequestBody):
    """What a called function has answered."""

    role: Literal["tool"]
    content: MessageContent
    tool_call_id: Text
    name: Text | None = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class JsonSchemaSpec(RequestBody):
    """A named JSON schema. It is always kept to, `strict` or not."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    description: Text | None = None
    strict: bool | None = None


class TextFormat(RequestBody):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(RequestBody):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(RequestBody):
    """JSON that keeps to a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaSpec


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatCompletionRequest(SamplingBody):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={"allOf": [only_with("stream_options", "stream"), only_with("top_logprobs", "logprobs")]}
    )

    messages: Prompts[ChatMessage]
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_OPENAI_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = False
    tools: Annotated[list[Any], Field(max_length=0)] | None = None  # clients send empty ones
