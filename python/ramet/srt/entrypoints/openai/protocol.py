"""Owns the bodies of the OpenAI routes: the fields that are read, their types and ranges.

What is taken of other fields says http/accepted_fields.py.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from ramet.srt.entrypoints.http import accepted_fields
from ramet.srt.entrypoints.http.accepted_fields import Table, is_empty
from ramet.srt.entrypoints.http.http_validation import (
    MAX_PROMPTS,
    Priority,
    Prompts,
    PromptText,
    RequestBody,
    RequestId,
    Text,
    TokenId,
    TokenIds,
)
from ramet.srt.sampling.sampling_params import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_SEED,
    MAX_SEQUENCES,
    MAX_TOKENS,
    MIN_SEED,
    TOKEN_KEY,
)

MAX_OPENAI_LOGPROBS = 20
MAX_TOOL_CALLS = 256
MAX_TOOLS = 1024
TOOL_NAME = r"^[a-zA-Z0-9_.:/-]{1,256}$"
MAX_CHOICES = 4096
MAX_TEMPLATE_CHARS = 128 << 10


def at_most(max_entries: int) -> Callable[[Any], Any]:
    """A check that comes before that of each entry, of which pydantic would tell one error each."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > max_entries:
            raise ValueError(f"at most {max_entries} entries are taken, not {len(value)}")
        return value

    return check


def none_if_empty(value: Any) -> Any:
    """None for a value that says nothing, where that needn't be one of the field's type."""
    return None if is_empty(value) else value


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
TokenLimit = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TokenIdList = Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKENS)]], Field(max_length=1024, fail_fast=True)]
AllowedTokens = Annotated[
    list[Annotated[int, Field(ge=0, le=MAX_TOKENS)]], Field(max_length=MAX_ALLOWED_TOKENS, fail_fast=True)
]
BadWords = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=256)]], Field(max_length=MAX_BAD_WORDS, fail_fast=True)
]
Choices = Annotated[list[Text], Field(max_length=MAX_CHOICES, fail_fast=True)]


def only_with(switch: str, option: str, says_something: dict[str, Any]) -> dict[str, Any]:
    """JSON schema: where `option` says something, `switch` is true."""
    return {
        "if": {"required": [option], "properties": {option: says_something}},
        "then": {"required": [switch], "properties": {switch: {"const": True}}},
    }


ANY_TRUE: dict[str, Any] = {
    "type": "object",
    "anyOf": [
        {"required": [name], "properties": {name: {"const": True}}}
        for name in ("include_usage", "continuous_usage_stats")
    ],
}
ONLY_STREAMED = only_with("stream", "stream_options", ANY_TRUE)
NOT_STREAMED: dict[str, Any] = {
    "if": {"required": ["prompt_logprobs"], "properties": {"prompt_logprobs": {"type": "integer"}}},
    "then": {"properties": {"stream": {"enum": [False, None]}}},
}


class StreamOptions(RequestBody):
    """Only with `stream`."""

    foreign: ClassVar[Table] = accepted_fields.STREAM_OPTIONS

    include_usage: bool | None = False  # a last event with it
    continuous_usage_stats: bool | None = False  # and every other one, too


class TextFormat(RequestBody):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(RequestBody):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaSpec(RequestBody):
    """A named JSON schema. It is always kept to, `strict` or not."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    description: Text | None = None
    strict: bool | None = None


class JsonSchemaFormat(RequestBody):
    """JSON that keeps to a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaSpec


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(RequestBody):
    """vLLM's way to say what form the output has: one of them."""

    foreign: ClassVar[Table] = accepted_fields.STRUCTURED_OUTPUTS

    schema_: Annotated[Text | dict[str, Any] | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class SamplingBody(RequestBody):
    """What both OpenAI routes have: OpenAI's own parameters, then those that SGLang adds to them.

    Where None is the default of a number, the model's own default counts, and else that of /generate.
    """

    model: Text | None = None  # there is only one
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = 1
    max_tokens: TokenLimit | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: (
        Annotated[str, Field(max_length=4096)] | Annotated[list[StopText], Field(max_length=64, fail_fast=True)] | None
    ) = None
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    frequency_penalty: Penalty | None = 0.0
    presence_penalty: Penalty | None = 0.0
    logit_bias: LogitBias | None = None
    response_format: Annotated[ResponseFormat | None, BeforeValidator(none_if_empty)] = None

    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = 0
    stop_token_ids: TokenIdList | None = None
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    no_stop_trim: bool | None = False
    regex: Text | None = None
    ebnf: Text | None = None
    rid: RequestId | None = None
    priority: Priority | None = None
    return_cached_tokens_details: bool | None = False

    # vLLM's
    request_id: RequestId | None = None
    include_stop_str_in_output: bool | None = False
    allowed_token_ids: AllowedTokens | None = None
    bad_words: BadWords | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_OPENAI_LOGPROBS)] | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    add_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Text | dict[str, Any] | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    model_config = ConfigDict(json_schema_extra={"allOf": [ONLY_STREAMED, NOT_STREAMED]})
    foreign: ClassVar[Table] = accepted_fields.COMPLETIONS

    prompt: PromptText | Prompts[PromptText] | TokenIds | Prompts[TokenIds]
    echo: bool | None = False
    logprobs: Annotated[
        Annotated[int, Field(ge=0, le=MAX_OPENAI_LOGPROBS)] | None,
        BeforeValidator(lambda value: None if value is False else value),  # as a chat says that it wants none
    ] = None
    json_schema: Text | dict[str, Any] | None = None


class TextPart(RequestBody):
    """A piece of a message's content."""

    foreign: ClassVar[Table] = accepted_fields.TEXT_PART

    type: Literal["text"]
    text: Text


MessageContent = Text | Prompts[TextPart]


class Message(RequestBody):
    """What messages of every role have in common."""

    foreign: ClassVar[Table] = accepted_fields.MESSAGE


class SystemMessage(Message):
    """Instructions; "developer" is OpenAI's newer word for the same."""

    role: Literal["system", "developer"]
    content: MessageContent
    name: Text | None = None


class UserMessage(Message):
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

    foreign: ClassVar[Table] = accepted_fields.TOOL_CALL

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Message):
    """What the model has said."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["content"]},
                {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
            ]
        }
    )

    role: Literal["assistant"]
    content: Annotated[MessageContent | None, BeforeValidator(lambda value: None if value == [] else value)] = None
    name: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None  # another name for it
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        """Without calls, a content that is null is an empty one: an answer that ended before it had any."""
        if self.content is None and not self.tool_calls:
            if "content" not in self.model_fields_set:
                raise ValueError("an assistant's message needs a content or tool_calls")
            self.content = ""
        return self


class ToolMessage(Message):
    """What a called function has answered."""

    role: Literal["tool"]
    content: MessageContent
    tool_call_id: Text
    name: Text | None = None


class FunctionSpec(RequestBody):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None  # JSON schema of its arguments
    strict: bool | None = None  # the arguments fit the schema also where the model is free to call or not


class ToolSpec(RequestBody):
    """What the model may use: functions alone."""

    foreign: ClassVar[Table] = accepted_fields.TOOL

    type: Literal["function"]
    function: FunctionSpec


class FunctionName(RequestBody):
    """One of the functions in `tools`."""

    name: Text


class NamedTool(RequestBody):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class ChatOptions(RequestBody):
    """What is said about how a chat becomes a prompt."""

    tools: Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    reasoning_effort: ReasoningEffort | None = None  # for templates that know it
    chat_template: Annotated[Text, Field(max_length=MAX_TEMPLATE_CHARS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False


class ChatCompletionRequest(SamplingBody, ChatOptions):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                ONLY_STREAMED,
                NOT_STREAMED,
                only_with("logprobs", "top_logprobs", {"type": "integer", "minimum": 1}),
            ]
        }
    )
    foreign: ClassVar[Table] = accepted_fields.CHAT

    messages: Prompts[ChatMessage]
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_OPENAI_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None  # None: "auto" where there are tools
    parallel_tool_calls: bool | None = True
    separate_reasoning: bool | None = True  # False: it is part of the content, as the model writes it
    stream_reasoning: bool | None = True  # False: a stream has it in one piece, when it has ended
    include_reasoning: bool | None = True  # vLLM's; False: it is left out


class TokenizeRequest(ChatOptions):
    """POST /tokenize: a prompt, or several, or the messages of a chat."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "required": ["prompt"],
                    "properties": {"prompt": {"type": ["string", "array"]}, "messages": {"type": "null"}},
                },
                {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
            ]
        }
    )
    foreign: ClassVar[Table] = accepted_fields.CHAT

    model: Text | None = None
    prompt: Text | Annotated[list[Text], Field(max_length=MAX_PROMPTS, fail_fast=True)] | None = None
    messages: Prompts[ChatMessage] | None = None
    add_special_tokens: bool | None = None  # true for prompts; false for chats, whose template has written them
    return_token_strs: bool | None = False


AnyTokenIds = Annotated[list[TokenId], Field(fail_fast=True)]


class DetokenizeRequest(RequestBody):
    """POST /detokenize: the tokens of a text, or of several."""

    model: Text | None = None
    tokens: AnyTokenIds | Annotated[list[AnyTokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    skip_special_tokens: bool | None = None
