"""Owns the bodies of the Responses routes: the fields that are read, their types and ranges.

What is taken of other fields says http/accepted_fields.py. Source: OpenAI's API reference of POST /v1/responses.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from ramet.srt.entrypoints.http import accepted_fields
from ramet.srt.entrypoints.http.accepted_fields import Table
from ramet.srt.entrypoints.http.http_validation import MAX_PROMPTS, Priority, RequestBody, RequestId, Text
from ramet.srt.entrypoints.openai.protocol import (
    MAX_OPENAI_LOGPROBS,
    MAX_TOOLS,
    TOOL_NAME,
    JsonObjectFormat,
    Penalty,
    ReasoningEffort,
    StopText,
    TextFormat,
    at_most,
)
from ramet.srt.sampling.sampling_params import MAX_SEED, MAX_TOKENS, MIN_SEED

MAX_METADATA = 64
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED_REASONING = "reasoning.encrypted_content"

Entry = TypeVar("Entry")
Entries = Annotated[list[Entry], Field(max_length=MAX_PROMPTS, fail_fast=True)]
Metadata = Annotated[
    dict[Text, Text],
    BeforeValidator(at_most(MAX_METADATA)),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": MAX_METADATA}),
]


# ---- input items ----


class InputText(RequestBody):
    """A piece of text that goes in."""

    foreign: ClassVar[Table] = accepted_fields.RESPONSES_PART

    type: Literal["input_text"]
    text: Text


class OutputText(RequestBody):
    """A piece of text that came out earlier."""

    foreign: ClassVar[Table] = accepted_fields.RESPONSES_PART

    type: Literal["output_text"]
    text: Text


class Refusal(RequestBody):
    """That the model did not want to answer."""

    type: Literal["refusal"]
    refusal: Text


class SummaryText(RequestBody):
    """A summary of reasoning."""

    type: Literal["summary_text"]
    text: Text


class ReasoningText(RequestBody):
    """A piece of reasoning."""

    type: Literal["reasoning_text"]
    text: Text


ContentPart = Annotated[InputText | OutputText | Refusal, Field(discriminator="type")]


class Item(RequestBody):
    """What the items have in common."""

    foreign: ClassVar[Table] = accepted_fields.RESPONSES_ITEM

    id: RequestId | None = None


class MessageItem(Item):
    """What somebody says."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Entries[ContentPart]


class FunctionCallItem(Item):
    """A call of a function that the model has made."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text


class FunctionCallOutputItem(Item):
    """What a called function has answered."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Text | Entries[InputText]


class ReasoningItem(Item):
    """What the model thought before it said or called something."""

    type: Literal["reasoning"]
    summary: Entries[SummaryText] = []
    content: Entries[ReasoningText] | None = None
    encrypted_content: Text | None = None


class ItemReference(RequestBody):
    """An item of a response that the server remembers."""

    type: Literal["item_reference"]
    id: RequestId


def _with_type(value: Any) -> Any:
    """The item with the type that it may leave out."""
    if not isinstance(value, dict) or value.get("type") is not None:
        return value
    return {**value, "type": "item_reference" if value.keys() <= {"id", "type"} else "message"}


AnyItem = Annotated[
    MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem | ItemReference,
    Field(discriminator="type"),
]
InputItem = Annotated[AnyItem, BeforeValidator(_with_type)]


# ---- the rest of the body ----


class JsonSchemaTextFormat(RequestBody):
    """JSON that keeps to a schema. It is always kept to, `strict` or not."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    description: Text | None = None
    strict: bool | None = None


class TextConfig(RequestBody):
    """What form the answer has."""

    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaTextFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None  # the model decides how much it says


class Reasoning(RequestBody):
    """How much is thought."""

    foreign: ClassVar[Table] = accepted_fields.RESPONSES_REASONING

    effort: ReasoningEffort | None = None


class FunctionTool(RequestBody):
    """A function that the model may call."""

    foreign: ClassVar[Table] = accepted_fields.RESPONSES_TOOL

    type: Literal["function"]
    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(RequestBody):
    """The function that must be called."""

    type: Literal["function"]
    name: Text


class AllowedTools(RequestBody):
    """The functions that may, or one of which must, be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


ToolChoice = Annotated[FunctionChoice | AllowedTools, Field(discriminator="type")] | Literal["none", "auto", "required"]


SAYS_SOMETHING: dict[str, Any] = {
    "anyOf": [
        {
            "required": ["input"],
            "properties": {"input": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}]}},
        },
        {
            "required": ["previous_response_id"],
            "properties": {"previous_response_id": {"type": "string", "minLength": 1}},
        },
    ]
}


class InputTokensRequest(RequestBody):
    """POST /v1/responses/input_tokens, and what every response is made from."""

    model_config = ConfigDict(json_schema_extra=SAYS_SOMETHING)
    foreign: ClassVar[Table] = accepted_fields.RESPONSES

    model: Text | None = None  # there is only one
    input: Text | Entries[InputItem] | None = None
    instructions: Text | None = None
    previous_response_id: RequestId | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # SGLang's and vLLM's

    def texts(self) -> Iterator[str]:
        """All that goes into the prompt."""
        yield self.instructions or ""
        if isinstance(self.input, str):
            yield self.input
            return
        for item in self.input or ():
            if isinstance(item, MessageItem):
                yield _text_of(item.content)
            elif isinstance(item, FunctionCallItem):
                yield item.arguments
            elif isinstance(item, FunctionCallOutputItem):
                yield _text_of(item.output)
            elif isinstance(item, ReasoningItem):
                yield _text_of(item.content or item.summary) or item.encrypted_content or ""


def _text_of(content: str | Sequence[InputText | OutputText | Refusal | SummaryText | ReasoningText]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)


class ResponsesStreamOptions(RequestBody):
    """Nothing that is read."""

    foreign: ClassVar[Table] = accepted_fields.STREAM_OPTIONS


class ResponsesRequest(InputTokensRequest):
    """POST /v1/responses: OpenAI's own fields, then those that SGLang and vLLM add to them."""

    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_OPENAI_LOGPROBS)] | None = None
    include: (
        Entries[
            Literal[
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
                # of items that there are none of here
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "message.input_image.image_url",
                "computer_call_output.output.image_url",
                "code_interpreter_call.outputs",
            ]
        ]
        | None
    ) = None
    store: bool | None = None
    stream: bool | None = False
    stream_options: ResponsesStreamOptions | None = None
    metadata: Metadata | None = None
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    stop: (
        Annotated[str, Field(max_length=4096)] | Annotated[list[StopText], Field(max_length=64, fail_fast=True)] | None
    ) = None
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    rid: RequestId | None = None
    request_id: RequestId | None = None
    priority: Priority | None = None

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def wants_encoded_reasoning(self) -> bool:
        """Whether reasoning items have their `encrypted_content`: clients carry it where the server keeps nothing."""
        return self.store is False or ENCRYPTED_REASONING in (self.include or ())
