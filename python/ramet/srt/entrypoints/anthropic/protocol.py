"""Owns the bodies of Anthropic's routes: the fields that are read, their types and ranges.

Source: the types of the published `anthropic` client. What is taken of other fields says http/accepted_fields.py.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from ramet.srt.entrypoints.http import accepted_fields
from ramet.srt.entrypoints.http.accepted_fields import Table
from ramet.srt.entrypoints.http.http_validation import MAX_PROMPTS, Prompts, RequestBody, Text
from ramet.srt.entrypoints.openai.protocol import MAX_TOOLS, TOOL_NAME, StopText, TokenLimit
from ramet.srt.sampling.sampling_params import MAX_TOKENS

MAX_STOP_SEQUENCES = 64
BlockId = Annotated[Text, Field(min_length=1, max_length=256)]


class Block(RequestBody):
    """What the blocks of a message's content have in common."""

    foreign: ClassVar[Table] = accepted_fields.BLOCK


class TextBlock(Block):
    """A piece of text."""

    foreign: ClassVar[Table] = accepted_fields.TEXT_BLOCK

    type: Literal["text"]
    text: Text


Texts: TypeAlias = Text | Annotated[list[TextBlock], Field(max_length=MAX_PROMPTS, fail_fast=True)]


class ThinkingBlock(Block):
    """What the model has thought. Its signature is not looked at."""

    foreign: ClassVar[Table] = accepted_fields.THINKING_BLOCK

    type: Literal["thinking"]
    thinking: Text


class RedactedThinkingBlock(Block):
    """What another server's model has thought, encrypted: nothing that could be shown to this one."""

    type: Literal["redacted_thinking"]
    data: Text | None = None


class ToolUseBlock(Block):
    """A call that the model has made."""

    foreign: ClassVar[Table] = accepted_fields.TOOL_USE_BLOCK

    type: Literal["tool_use"]
    id: BlockId
    name: Text
    input: dict[str, Any]


class ToolResultBlock(Block):
    """What a call has come to."""

    type: Literal["tool_result"]
    tool_use_id: BlockId
    content: Texts | None = None
    is_error: bool | None = False


UserBlock: TypeAlias = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock: TypeAlias = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, Field(discriminator="type")
]
AnyBlock: TypeAlias = TextBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock


class Turn(RequestBody):
    """What messages of every role have in common."""

    foreign: ClassVar[Table] = accepted_fields.TURN


class UserTurn(Turn):
    """What the person says, and what the model's calls have come to."""

    role: Literal["user"]
    content: Text | Annotated[list[UserBlock], Field(max_length=MAX_PROMPTS, fail_fast=True)]


class AssistantTurn(Turn):
    """What the model has said. The last message may be the beginning of the answer."""

    role: Literal["assistant"]
    content: Text | Annotated[list[AssistantBlock], Field(max_length=MAX_PROMPTS, fail_fast=True)]


class SystemTurn(Turn):
    """Instructions in the middle of a conversation."""

    role: Literal["system"]
    content: Texts


AnyTurn: TypeAlias = Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]


class CustomTool(RequestBody):
    """A function that the client runs."""

    foreign: ClassVar[Table] = accepted_fields.CUSTOM_TOOL

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class AnyToolChoice(RequestBody):
    """Whether tools are called: "auto" leaves it to the model, "any" wants a call."""

    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = False


class OneToolChoice(RequestBody):
    """The tool that must be called."""

    type: Literal["tool"]
    name: Text
    disable_parallel_tool_use: bool | None = False


class NoToolChoice(RequestBody):
    """No tool may be called."""

    type: Literal["none"]


ToolChoice: TypeAlias = Annotated[AnyToolChoice | OneToolChoice | NoToolChoice, Field(discriminator="type")]


class ThinkingOn(RequestBody):
    """The model may think. `budget_tokens` is no limit here: `max_tokens` is the limit of all output."""

    type: Literal["enabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    display: Literal["summarized", "omitted"] | None = None  # "summarized": all of it, as it is


class ThinkingOff(RequestBody):
    """The model is not to think."""

    type: Literal["disabled"]


Thinking: TypeAlias = Annotated[ThinkingOn | ThinkingOff, Field(discriminator="type")]


class JsonOutput(RequestBody):
    """JSON that keeps to a schema."""

    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(RequestBody):
    """How much effort the model makes, and what form its text has."""

    foreign: ClassVar[Table] = accepted_fields.OUTPUT_CONFIG

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonOutput | None = None


class Conversation(RequestBody):
    """What both routes have."""

    foreign: ClassVar[Table] = accepted_fields.MESSAGES

    model: Text | None = None  # there is only one
    messages: Prompts[AnyTurn]
    system: Texts | None = None
    tools: Annotated[list[CustomTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonOutput | None = None  # an older place of output_config.format
    thread: dict[str, Any] | None = None  # a conversation that the server keeps: refused so that clients send all of it


class MessagesRequest(Conversation):
    """POST /v1/messages."""

    max_tokens: TokenLimit
    stream: bool | None = False
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOP_SEQUENCES, fail_fast=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None  # 0: all tokens


class CountTokensRequest(Conversation):
    """POST /v1/messages/count_tokens."""
