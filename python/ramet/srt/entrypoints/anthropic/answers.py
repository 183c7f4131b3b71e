"""Owns the description of Anthropic's successful answers for the OpenAPI page. Answers are written without it."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ramet.srt.entrypoints.http.answers import Answer, AnswerMetadata


class TextAnswer(Answer):
    """A piece of the answer."""

    type: Literal["text"]
    text: str


class ThinkingAnswer(Answer):
    """What the model has thought. Nothing is signed."""

    type: Literal["thinking"]
    thinking: str
    signature: Literal[""]


class ToolUseAnswer(Answer):
    """A call of one of the request's tools."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageTokensDetails(Answer):
    """What the output's tokens were for."""

    thinking_tokens: int


class MessageUsage(Answer):
    """Token counts: the prompt has `input_tokens` and `cache_read_input_tokens`."""

    input_tokens: int
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: MessageTokensDetails


class MessageAnswer(Answer):
    """The answer of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Annotated[TextAnswer | ThinkingAnswer | ToolUseAnswer, Field(discriminator="type")]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage
    metadata: AnswerMetadata  # in a stream with `message_delta`


class TokenCount(Answer):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int
