"""Owns what stands between a response and the chat that it is: the chat's body, and errors in the response's words."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest
from ramet.srt.entrypoints.openai.responses_items import JsonItem, chat_messages
from ramet.srt.entrypoints.openai.responses_protocol import (
    LOGPROBS,
    AllowedTools,
    FunctionChoice,
    FunctionTool,
    InputTokensRequest,
    JsonSchemaTextFormat,
    ResponsesRequest,
    TextConfig,
)
from ramet.srt.errors import RequestError

# Fields of a chat, and what they are called here.
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
NAME = re.compile(rf"\b(?:{'|'.join(NAMES)})\b(?=[ .:\[]|$)")
SAME_NAMES = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "stop",
    "seed", "min_tokens", "ignore_eos", "rid", "request_id", "priority",
)  # fmt: skip


def chat_body(body: InputTokensRequest, items: Sequence[JsonItem]) -> ChatCompletionRequest:
    """The chat that has `items` as its messages, and asks for what `body` asks for.

    Raises:
        RequestError: in words of the response, if there is no such chat.
    """
    if not items:
        raise RequestError("input must be given, and not be empty", param="input")
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": chat_messages(items, body.instructions),
        "tools": [_tool(tool) for tool in _allowed(body)],
        "tool_choice": _choice(body),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
        "response_format": _format(body.text),
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    if isinstance(body, ResponsesRequest):
        if body.top_logprobs and not body.wants_logprobs:
            raise RequestError(f'top_logprobs is only allowed with include: ["{LOGPROBS}"]', param="top_logprobs")
        fields |= {name: getattr(body, name) for name in SAME_NAMES}
        fields["max_completion_tokens"] = body.max_output_tokens
        fields["logprobs"] = body.wants_logprobs
        fields["top_logprobs"] = body.top_logprobs
        # What comes at once can't be told apart: which of the tokens are those of the message.
        fields["stream"] = bool(body.stream) or body.wants_logprobs
    fields = {name: value for name, value in fields.items() if value is not None}
    with response_names():
        return ChatCompletionRequest.make(**fields)


def _allowed(body: InputTokensRequest) -> list[FunctionTool]:
    """The tools that may be called. Raises RequestError for one that is allowed, and not there."""
    tools, choice = body.tools or [], body.tool_choice
    if not isinstance(choice, AllowedTools):
        return tools
    allowed = {one.name for one in choice.tools}
    missing = allowed.difference(tool.name for tool in tools)
    if missing:
        raise RequestError(f"tool_choice: there is no tool of the name {min(missing)!r}", param="tool_choice")
    return [tool for tool in tools if tool.name in allowed]


def _tool(tool: FunctionTool) -> dict[str, Any]:
    fields = tool.model_dump(exclude_none=True, exclude={"type"})
    return {"type": "function", "function": fields}


def _choice(body: InputTokensRequest) -> Any:
    choice = body.tool_choice
    if isinstance(choice, AllowedTools):
        return choice.mode
    if isinstance(choice, FunctionChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def _format(text: TextConfig | None) -> dict[str, Any] | None:
    if text is None or text.format is None:
        return None
    if not isinstance(text.format, JsonSchemaTextFormat):
        return {"type": text.format.type}
    fields = text.format.model_dump(exclude_none=True, by_alias=True, exclude={"type"})
    return {"type": "json_schema", "json_schema": fields}


@contextlib.contextmanager
def response_names() -> Iterator[None]:
    """A block whose RequestErrors call parameters as a response's body does."""
    try:
        yield
    except RequestError as error:
        raise with_response_names(error) from None


def with_response_names(error: RequestError) -> RequestError:
    """The error of a chat in words of the response."""
    message = NAME.sub(lambda found: NAMES[found[0]], str(error))
    param = NAMES.get(error.param or "", error.param)
    return RequestError(message, param=param, code=error.code, status_code=error.status_code)
