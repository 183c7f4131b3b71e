"""Owns what Anthropic's Python client is asked to do."""

from typing import Literal

from anthropic import Anthropic, AsyncAnthropic, BadRequestError
from pydantic import BaseModel
from steps import FLOW, MODEL, URL, run, step

client = Anthropic(base_url=URL, api_key="none", max_retries=0)
CHAT = [{"role": "user", "content": FLOW["question"]}]
ASK = {"model": MODEL, "extra_body": {"temperature": 0}, "max_tokens": FLOW["max_tokens"], "system": FLOW["system"]}
TOOL = {
    "name": FLOW["tool"]["name"],
    "description": FLOW["tool"]["description"],
    "input_schema": FLOW["tool"]["parameters"],
}
TOOL_CHAT = [{"role": "user", "content": FLOW["tool_question"]}]
ASK_TOOL = {"model": MODEL, "extra_body": {"temperature": 0}, "max_tokens": FLOW["max_object_tokens"], "tools": [TOOL]}


class Plant(BaseModel, extra="forbid"):
    plant: Literal["oak", "fern", "moss"]
    edible: bool


def text_of(message):
    return "".join(block.text for block in message.content if block.type == "text")


def num_input(usage):
    """All input tokens: those that the prefix cache had are told apart."""
    return usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)


def call_of(message):
    call = next(block for block in message.content if block.type == "tool_use")
    return {"name": call.name, "arguments": call.input, "id": call.id, "stop_reason": message.stop_reason}


@step
def models():
    return [one.id for one in client.models.list()]


@step
def message():
    answer = client.messages.create(messages=CHAT, **ASK)
    return {
        "text": text_of(answer),
        "stop_reason": answer.stop_reason,
        "role": answer.role,
        "type": answer.type,
        "usage": [num_input(answer.usage), answer.usage.output_tokens],
    }


@step
def message_events():
    events = list(client.messages.create(messages=CHAT, stream=True, **ASK))
    return {
        "kinds": [event.type for event in events],
        "text": "".join(event.delta.text for event in events if event.type == "content_block_delta"),
        "input_tokens": num_input(events[0].message.usage),
        "output_tokens": next(event for event in events if event.type == "message_delta").usage.output_tokens,
        "stop_reason": next(event for event in events if event.type == "message_delta").delta.stop_reason,
    }


@step
def message_stream():
    with client.messages.stream(messages=CHAT, **ASK) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    return {"text": "".join(pieces), "whole": text_of(final), "num_pieces": len(pieces)}


@step
async def message_async():
    async with AsyncAnthropic(base_url=URL, api_key="none", max_retries=0) as one:
        return {"text": text_of(await one.messages.create(messages=CHAT, **ASK))}


@step
def message_blocks():
    """Content and system as blocks, with a mark for a cache, as applications write them."""
    mark = {"cache_control": {"type": "ephemeral"}}
    answer = client.messages.create(
        **{**ASK, "system": [{"type": "text", "text": FLOW["system"], **mark}]},
        messages=[{"role": "user", "content": [{"type": "text", "text": FLOW["question"], **mark}]}],
        metadata={"user_id": "me"},
    )
    return {"text": text_of(answer)}


@step
def message_cut():
    answer = client.messages.create(messages=CHAT, **{**ASK, "max_tokens": 8})
    return {"text": text_of(answer), "why": [answer.stop_reason]}


@step
def message_sent_back():
    first = client.messages.create(messages=CHAT, **ASK)
    history = [
        *CHAT,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": FLOW["follow_up"]},
    ]
    return {"text": text_of(client.messages.create(messages=history, **ASK))}


@step
def message_stopped():
    whole = text_of(client.messages.create(messages=CHAT, **ASK))
    word = whole.split()[2]
    answer = client.messages.create(messages=CHAT, stop_sequences=[word], **ASK)
    return {
        "text": text_of(answer),
        "before": whole[: whole.index(word)],
        "stop_reason": answer.stop_reason,
        "stopped_by_word": answer.stop_sequence == word,
    }


@step
def count_tokens():
    counted = client.messages.count_tokens(model=MODEL, messages=CHAT, system=FLOW["system"])
    answer = client.messages.create(messages=CHAT, **ASK)
    return {"counted": counted.input_tokens, "used": num_input(answer.usage)}


@step
def tool_any():
    return call_of(client.messages.create(messages=TOOL_CHAT, tool_choice={"type": "any"}, **ASK_TOOL))


@step
def tool_named():
    choice = {"type": "tool", "name": TOOL["name"], "disable_parallel_tool_use": True}
    return call_of(client.messages.create(messages=TOOL_CHAT, tool_choice=choice, **ASK_TOOL))


@step
def tool_stream():
    with client.messages.stream(messages=TOOL_CHAT, tool_choice={"type": "any"}, **ASK_TOOL) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        return {**call_of(stream.get_final_message()), "pieces": "".join(pieces)}


@step
def tool_round_trip():
    first = client.messages.create(messages=TOOL_CHAT, tool_choice={"type": "any"}, **ASK_TOOL)
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": FLOW["tool_result"]}
        for block in first.content
        if block.type == "tool_use"
    ]
    history = [*TOOL_CHAT, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    answer = client.messages.create(
        messages=history, tool_choice={"type": "none"}, **{**ASK_TOOL, "max_tokens": FLOW["max_tokens"]}
    )
    return {"text": text_of(answer), "stop_reason": answer.stop_reason}


@step
def tool_auto():
    answer = client.messages.create(messages=TOOL_CHAT, tool_choice={"type": "auto"}, **ASK_TOOL)
    return {"stop_reason": answer.stop_reason}


@step
def structured():
    """An answer by a schema, as the client's own helper asks for it."""
    answer = client.messages.parse(
        messages=CHAT, output_format=Plant, **{**ASK, "max_tokens": FLOW["max_object_tokens"]}
    )
    return {"object": answer.parsed_output.model_dump()}


@step
def refused():
    try:
        client.messages.create(messages=CHAT, **{**ASK, "extra_body": {"temperature": 9}})
    except BadRequestError as error:
        return {"type": error.body["type"], "error": error.body["error"]}
    return None


run()
