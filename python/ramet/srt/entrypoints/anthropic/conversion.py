"""Owns what a conversation in Anthropic's words is as a chat: the body from which the prompt and the answer come."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ramet.srt.entrypoints.anthropic.protocol import (
    AnyBlock,
    AnyTurn,
    Conversation,
    JsonOutput,
    MessagesRequest,
    NoToolChoice,
    OneToolChoice,
    TextBlock,
    Texts,
    ThinkingBlock,
    ThinkingOff,
    ToolResultBlock,
    ToolUseBlock,
)
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest
from ramet.srt.errors import RequestError

NO_THREADS = "thread_unsupported_request"  # the code on which clients go on without
FAILED = "Error: "  # before what a failed tool says: chat templates know no other way to tell it
HIGHEST_EFFORT = {"max": "xhigh"}
# By their names in a chat: what a conversation calls them.
NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config",
    "reasoning_effort": "output_config",
    "chat_template_kwargs": "thinking",
    "parallel_tool_calls": "tool_choice",
}


class _Turn(NamedTuple):
    """Neighbours of one role: models are trained on roles that take turns, and templates may refuse others."""

    role: str
    blocks: list[AnyBlock]


def chat_of(body: Conversation) -> ChatCompletionRequest:
    """The chat that says the same.

    Raises:
        RequestError: if the conversation contradicts itself.
    """
    if body.thread is not None:
        raise RequestError(
            "thread: conversations are not kept here; send all messages", param="thread", code=NO_THREADS
        )
    messages, is_continued = _messages(body)
    fields: dict[str, Any] = {"model": body.model, "messages": messages, "continue_final_message": is_continued}
    fields |= _tools(body)
    wanted = _wanted_form(body)
    if wanted is not None:
        schema = {"name": "output", "schema": wanted.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if body.output_config is not None and body.output_config.effort is not None:
        effort = body.output_config.effort
        fields["reasoning_effort"] = HIGHEST_EFFORT.get(effort, effort)
    if body.thinking is not None:
        thinks = not isinstance(body.thinking, ThinkingOff)
        fields["chat_template_kwargs"] = {"enable_thinking": thinks, "thinking": thinks}  # two names for it
    if isinstance(body, MessagesRequest):
        names = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        fields |= {name: getattr(body, name) for name in names}
        fields["stop"] = body.stop_sequences
    with our_words():
        return ChatCompletionRequest.make(**fields)


def _wanted_form(body: Conversation) -> JsonOutput | None:
    config = body.output_config
    newer = None if config is None else config.format
    if newer is not None and body.output_format is not None:
        raise RequestError(
            "output_format is an older name of output_config.format: only one of them can be given",
            param="output_format",
        )
    return newer or body.output_format


def _tools(body: Conversation) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if body.tools:
        fields["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                    "strict": tool.strict,
                },
            }
            for tool in body.tools
        ]
    choice = body.tool_choice
    if choice is None:
        return fields
    if isinstance(choice, NoToolChoice):
        fields["tool_choice"] = "none"
        return fields
    fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if isinstance(choice, OneToolChoice):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        fields["tool_choice"] = "required" if choice.type == "any" else "auto"
    return fields


# ---- messages ----


def _messages(body: Conversation) -> tuple[list[dict[str, Any]], bool]:
    """The chat's messages, and whether the answer goes on with the last one."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _content(_text_blocks(body.system))})
    turns = _turns(body.messages)
    is_continued = turns[-1].role == "assistant"
    if is_continued:
        _check_beginning(turns[-1])
        if not any(isinstance(block, TextBlock | ThinkingBlock) for block in turns[-1].blocks):
            turns.pop()  # nothing to go on with
            is_continued = False
    names: dict[str, str] = {}  # of the tools that were called, by the id of the call
    for turn in turns:
        if turn.role == "user":
            messages += _user_messages(turn, names)
        elif turn.role == "assistant":
            messages.append(_assistant_message(turn))
            names |= {block.id: block.name for block in turn.blocks if isinstance(block, ToolUseBlock)}
        else:
            messages.append({"role": "system", "content": _content(turn.blocks)})
    if is_continued:  # one text, which the answer goes on with
        texts = [block.text for block in turns[-1].blocks if isinstance(block, TextBlock)]
        messages[-1]["content"] = "\n".join(texts)
    return messages, is_continued


def _turns(messages: Sequence[AnyTurn]) -> list[_Turn]:
    turns: list[_Turn] = []
    for message in messages:
        if not turns or turns[-1].role != message.role:
            turns.append(_Turn(message.role, []))
        turns[-1].blocks.extend(_text_blocks(message.content) if isinstance(message.content, str) else message.content)
    return turns


def _text_blocks(texts: Texts) -> Sequence[TextBlock]:
    if not isinstance(texts, str):
        return texts
    return [TextBlock.model_construct(type="text", text=texts)] if texts else []


def _check_beginning(turn: _Turn) -> None:
    """Raises RequestError if the answer can't go on with the assistant's last message."""
    call = next((block for block in turn.blocks if isinstance(block, ToolUseBlock)), None)
    if call is not None:
        raise RequestError(
            f"messages: the last message calls a tool ({call.id!r:.100}), and no tool_result follows: there is nothing "
            "that the answer could go on with",
            param="messages",
        )


def _content(blocks: Sequence[AnyBlock]) -> str | list[dict[str, Any]]:
    """The texts among the blocks: one as it is, several as parts."""
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    if len(texts) > 1:
        return [{"type": "text", "text": text} for text in texts]
    return texts[0] if texts else ""


def _user_messages(turn: _Turn, names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """A message for each tool's result, then the person's text."""
    results = [block for block in turn.blocks if isinstance(block, ToolResultBlock)]
    for result in results:
        texts = list(_text_blocks(result.content or ""))
        if result.is_error:
            first, *others = texts or [TextBlock.model_construct(type="text", text="")]
            texts = [TextBlock.model_construct(type="text", text=FAILED + first.text), *others]
        yield {
            "role": "tool",
            "content": _content(texts),
            "tool_call_id": result.tool_use_id,
            "name": names.get(result.tool_use_id),
        }
    if len(turn.blocks) > len(results) or not results:
        yield {"role": "user", "content": _content(turn.blocks)}


def _assistant_message(turn: _Turn) -> dict[str, Any]:
    thoughts = [block.thinking for block in turn.blocks if isinstance(block, ThinkingBlock) and block.thinking]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
        for block in turn.blocks
        if isinstance(block, ToolUseBlock)
    ]
    return {
        "role": "assistant",
        "content": _content(turn.blocks),
        "reasoning_content": "\n".join(thoughts) if thoughts else None,
        "tool_calls": calls or None,
    }


# ---- errors ----


@contextlib.contextmanager
def our_words() -> Iterator[None]:
    """A block whose RequestErrors call a chat's fields as a conversation does."""
    try:
        yield
    except RequestError as error:
        raise in_our_words(error) from None


def in_our_words(error: RequestError) -> RequestError:
    """The error with a conversation's name of the field."""
    name = NAMES.get(error.param or "")
    if name is None:
        return error
    message = str(error)
    if message.startswith(f"{error.param}"):
        message = name + message.removeprefix(f"{error.param}")
    else:
        message = f"{name}: {message}"
    return RequestError(message, param=name, code=error.code, status_code=error.status_code)
