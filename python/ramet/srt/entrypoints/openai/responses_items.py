"""Owns the items of responses: those of an input made complete, and items as a chat's messages.

An item is a JSON object as clients have it: the same that goes out, comes back, and is remembered.
"""

import base64
import binascii
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from ramet.srt.entrypoints.openai.responses_protocol import (
    FunctionCallItem,
    FunctionCallOutputItem,
    MessageItem,
    ReasoningItem,
)
from ramet.srt.errors import RequestError

JsonItem = dict[str, Any]
ID_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
ENCODED_PREFIX = "ramet:"  # of reasoning as it stands in `encrypted_content`


def new_id(prefix: str) -> str:
    """An id that nobody guesses."""
    return f"{prefix}_{uuid.uuid4().hex}"


def user_message(text: str) -> JsonItem:
    """An input that is only a text, as the item that it stands for."""
    return complete_item(MessageItem(role="user", content=text))


def complete_item(given: MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem) -> JsonItem:
    """An item of an input with all that an item has; its content is a list of parts."""
    fields = given.model_dump(exclude_none=True)
    item = {"id": given.id or new_id(ID_PREFIXES[given.type]), "type": given.type, **fields}
    if isinstance(given, ReasoningItem):
        return item
    if isinstance(given, MessageItem):
        if isinstance(given.content, str):
            item["content"] = [{"type": "input_text", "text": given.content}]
        if given.role == "assistant":
            item["content"] = [_as_output(part) for part in item["content"]]
    item["status"] = "completed"
    return item


def _as_output(part: JsonItem) -> JsonItem:
    """A part of what the model has said."""
    if part["type"] == "refusal":
        return part
    return {"type": "output_text", "text": part["text"], "annotations": []}


def encode_reasoning(text: str) -> str:
    """Reasoning in the form that clients carry without looking into it. It is no secret: nothing is encrypted."""
    return ENCODED_PREFIX + base64.urlsafe_b64encode(text.encode()).decode()


def reasoning_text(item: JsonItem) -> str:
    """What was thought: the item's content, or else what its `encrypted_content` carries, or else its summary.

    Raises:
        RequestError: if `encrypted_content` alone is there, and is another server's.
    """
    if item.get("content"):
        return "".join(part["text"] for part in item["content"])
    encoded = item.get("encrypted_content")
    if encoded:
        try:
            if encoded.startswith(ENCODED_PREFIX):
                return base64.b64decode(encoded.removeprefix(ENCODED_PREFIX), b"-_", validate=True).decode()
        except (binascii.Error, ValueError):
            pass
        raise RequestError(
            "input: the encrypted_content of a reasoning item is not of this server, which can't read it",
            param="input",
        )
    return "\n\n".join(part["text"] for part in item.get("summary") or ())


def chat_messages(items: Iterable[JsonItem], instructions: str | None) -> list[dict[str, Any]]:
    """The messages of a chat, in the form of /v1/chat/completions.

    What the model thinks, says and calls in one turn is one message.

    Raises:
        RequestError: if a function has answered that was not called, or reasoning can't be read.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    turn: dict[str, Any] | None = None  # the assistant's message that the next item may belong to
    call_ids = set()
    for item in items:
        kind = item["type"]
        if kind == "function_call_output":
            turn = None
            if item["call_id"] not in call_ids:
                raise RequestError(
                    f"input: a function_call_output has the call_id {item['call_id']!r}, but no function_call has it",
                    param="input",
                )
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _content(item["output"])})
        elif kind == "message" and item["role"] != "assistant":
            turn = None
            messages.append({"role": item["role"], "content": _content(item["content"])})
        else:
            if turn is None or _begins_turn(item, turn):
                turn = {"role": "assistant"}
                messages.append(turn)
            if kind == "reasoning":
                turn["reasoning_content"] = turn.get("reasoning_content", "") + reasoning_text(item)
            elif kind == "function_call":
                call_ids.add(item["call_id"])
                turn.setdefault("tool_calls", []).append(_tool_call(item))
            else:
                turn["content"] = _joined(turn.get("content"), _content(item["content"]))
    for message in messages:
        if "content" not in message and "tool_calls" not in message:
            message["content"] = ""  # the model was cut off while it thought
    return messages


def _begins_turn(item: JsonItem, turn: dict[str, Any]) -> bool:
    """Whether the model's item is not of the turn before it."""
    if item["type"] == "reasoning":
        return "content" in turn or "tool_calls" in turn
    return item["type"] == "message" and "content" in turn and "tool_calls" not in turn


def _content(content: str | Sequence[JsonItem]) -> str | list[dict[str, Any]]:
    """An item's content as a message has it."""
    if isinstance(content, str):
        return content
    texts = [part["refusal"] if part["type"] == "refusal" else part["text"] for part in content]
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _joined(before: str | list[dict[str, Any]] | None, now: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """What the model has said in front of a call and behind it."""
    if before is None:
        return now
    return [
        part
        for content in (before, now)
        for part in ([{"type": "text", "text": content}] if isinstance(content, str) else content)
    ]


def _tool_call(item: JsonItem) -> dict[str, Any]:
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}
