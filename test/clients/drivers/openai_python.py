"""Owns what OpenAI's Python client is asked to do."""

from typing import Literal

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from steps import FLOW, MODEL, URL, run, step

client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
CHAT = [{"role": "system", "content": FLOW["system"]}, {"role": "user", "content": FLOW["question"]}]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": FLOW["max_tokens"]}
TOOL = {"type": "function", "function": FLOW["tool"]}
ASK_TOOL = {"model": MODEL, "temperature": 0, "max_tokens": FLOW["max_object_tokens"], "tools": [TOOL]}
TOOL_CHAT = [{"role": "user", "content": FLOW["tool_question"]}]
NAMED = {"type": "function", "function": {"name": FLOW["tool"]["name"]}}


class Plant(BaseModel, extra="forbid"):
    plant: Literal["oak", "fern", "moss"]
    edible: bool


@step
def models():
    return [one.id for one in client.models.list()]


@step
def chat():
    answer = client.chat.completions.create(messages=CHAT, **GREEDY)
    choice = answer.choices[0]
    return {
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
        "usage": answer.usage.model_dump(exclude_none=True),
    }


@step
def chat_stream():
    chunks = list(
        client.chat.completions.create(messages=CHAT, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    return {
        "text": "".join(pieces),
        "num_pieces": len(list(filter(None, pieces))),
        "finish_reason": reasons[-1],
        "usage": chunks[-1].usage.model_dump(exclude_none=True),
    }


@step
def chat_stream_helper():
    with client.chat.completions.stream(messages=CHAT, **GREEDY) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    return {"text": final.choices[0].message.content, "kinds": sorted(set(kinds))}


@step
async def chat_async():
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as one:
        answer = await one.chat.completions.create(messages=CHAT, **GREEDY)
    return {"text": answer.choices[0].message.content}


@step
def chat_sent_back():
    first = client.chat.completions.create(messages=CHAT, **GREEDY)
    history = [*CHAT, first.choices[0].message.model_dump(), {"role": "user", "content": FLOW["follow_up"]}]
    answer = client.chat.completions.create(messages=history, **GREEDY)
    return {"text": answer.choices[0].message.content}


@step
def chat_cut():
    choice = client.chat.completions.create(messages=CHAT, **{**GREEDY, "max_tokens": 8}).choices[0]
    return {"text": choice.message.content, "why": [choice.finish_reason]}


@step
def chat_parts():
    parts = [CHAT[0], {"role": "user", "content": [{"type": "text", "text": FLOW["question"]}]}]
    answer = client.chat.completions.create(messages=parts, **GREEDY)
    return {"text": answer.choices[0].message.content}


@step
def chat_habits():
    """What OpenAI's own applications send beside: nothing of it changes the answer."""
    answer = client.chat.completions.create(
        messages=CHAT,
        **GREEDY,
        logprobs=False,
        top_logprobs=0,
        n=1,
        tool_choice="none",
        parallel_tool_calls=True,
        service_tier="auto",
        store=False,
        modalities=["text"],
        prompt_cache_key="a key",
        safety_identifier="somebody",
        metadata={"who": "me"},
        user="me",
        response_format={"type": "text"},
    )
    return {"text": answer.choices[0].message.content}


@step
def chat_logprobs():
    answer = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=2, **GREEDY)
    content = answer.choices[0].logprobs.content
    return {
        "text": answer.choices[0].message.content,
        "tokens": [one.token for one in content],
        "num_tops": [len(one.top_logprobs) for one in content],
    }


@step
def completion():
    answer = client.completions.create(prompt=FLOW["prompt"], **GREEDY)
    return {"text": answer.choices[0].text, "finish_reason": answer.choices[0].finish_reason}


@step
def completion_stream():
    chunks = list(client.completions.create(prompt=FLOW["prompt"], stream=True, **GREEDY))
    return {"text": "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)}


@step
def completion_scored():
    """Score a prompt: nothing new is made."""
    answer = client.completions.create(model=MODEL, prompt=FLOW["prompt"], max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    return {"text": choice.text, "logprobs": choice.logprobs.token_logprobs}


def _call(message):
    call = message.tool_calls[0]
    return {"name": call.function.name, "arguments": call.function.arguments, "id": call.id, "type": call.type}


@step
def tool_required():
    answer = client.chat.completions.create(
        messages=TOOL_CHAT, tool_choice="required", parallel_tool_calls=False, **ASK_TOOL
    )
    message = answer.choices[0].message
    return {
        **_call(message),
        "finish_reason": answer.choices[0].finish_reason,
        "num_calls": len(message.tool_calls),
        "text": message.content,
    }


@step
def tool_named():
    answer = client.chat.completions.create(messages=TOOL_CHAT, tool_choice=NAMED, **ASK_TOOL)
    return _call(answer.choices[0].message)


@step
def tool_stream():
    deltas = []
    reasons = []
    for chunk in client.chat.completions.create(messages=TOOL_CHAT, tool_choice=NAMED, stream=True, **ASK_TOOL):
        if chunk.choices:
            deltas += chunk.choices[0].delta.tool_calls or []
            reasons.append(chunk.choices[0].finish_reason)
    return {
        "name": deltas[0].function.name,
        "id": deltas[0].id,
        "arguments": "".join(delta.function.arguments or "" for delta in deltas),
        "indices": sorted({delta.index for delta in deltas}),
        "finish_reason": reasons[-1],
    }


@step
def tool_round_trip():
    first = client.chat.completions.create(messages=TOOL_CHAT, tool_choice="required", **ASK_TOOL).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": FLOW["tool_result"]} for call in first.tool_calls]
    answer = client.chat.completions.create(
        messages=[*TOOL_CHAT, first.model_dump(), *results], tool_choice="none", **{**ASK_TOOL, **GREEDY}
    )
    return {"text": answer.choices[0].message.content, "finish_reason": answer.choices[0].finish_reason}


@step
def tool_auto():
    answer = client.chat.completions.create(messages=TOOL_CHAT, tool_choice="auto", **ASK_TOOL)
    return {"finish_reason": answer.choices[0].finish_reason}


@step
def structured():
    answer = client.chat.completions.parse(
        messages=CHAT, response_format=Plant, **{**GREEDY, "max_tokens": FLOW["max_object_tokens"]}
    )
    return {"object": answer.choices[0].message.parsed.model_dump()}


@step
def json_object():
    answer = client.chat.completions.create(
        messages=CHAT, response_format={"type": "json_object"}, model=MODEL, temperature=0, max_tokens=40
    )
    return {"text": answer.choices[0].message.content, "finish_reason": answer.choices[0].finish_reason}


RESPOND = {"model": MODEL, "temperature": 0, "max_output_tokens": FLOW["max_tokens"]}
RESPONSE_TOOL = {"type": "function", "strict": True, **FLOW["tool"]}


@step
def response():
    answer = client.responses.create(input=FLOW["question"], instructions=FLOW["system"], **RESPOND)
    return {
        "text": answer.output_text,
        "status": answer.status,
        "usage": [answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens],
    }


@step
def response_cut():
    answer = client.responses.create(input=CHAT, **{**RESPOND, "max_output_tokens": 8})
    return {"text": answer.output_text, "why": [answer.status, answer.incomplete_details.reason]}


@step
def response_stream():
    events = list(client.responses.create(input=CHAT, stream=True, **RESPOND))
    return {
        "kinds": [event.type for event in events],
        "numbers": [event.sequence_number for event in events],
        "text": "".join(event.delta for event in events if event.type == "response.output_text.delta"),
        "whole": events[-1].response.output_text,
    }


@step
def response_stream_helper():
    with client.responses.stream(input=CHAT, **RESPOND) as stream:
        for _ in stream:
            pass
        return {"text": stream.get_final_response().output_text}


@step
def response_previous():
    first = client.responses.create(input=CHAT, **RESPOND)
    answer = client.responses.create(input=FLOW["follow_up"], previous_response_id=first.id, **RESPOND)
    return {"text": answer.output_text, "previous": answer.previous_response_id == first.id}


@step
def response_retrieve():
    first = client.responses.create(input=CHAT, **RESPOND)
    found = client.responses.retrieve(first.id)
    client.responses.delete(first.id)
    return {"text": found.output_text}


@step
def response_sent_back():
    first = client.responses.create(input=CHAT, store=False, **RESPOND)
    history = [*CHAT, *(item.model_dump() for item in first.output), {"role": "user", "content": FLOW["follow_up"]}]
    return {"text": client.responses.create(input=history, store=False, **RESPOND).output_text}


@step
def response_tool():
    first = client.responses.create(
        model=MODEL, temperature=0, input=TOOL_CHAT, tools=[RESPONSE_TOOL], tool_choice="required"
    )
    call = next(item for item in first.output if item.type == "function_call")
    return {"name": call.name, "arguments": call.arguments, "id": call.call_id}


@step
def response_tool_stream():
    arguments = ""
    kinds = []
    for event in client.responses.create(
        model=MODEL, temperature=0, input=TOOL_CHAT, tools=[RESPONSE_TOOL], tool_choice="required", stream=True
    ):
        kinds.append(event.type)
        if event.type == "response.function_call_arguments.delta":
            arguments += event.delta
        if event.type == "response.output_item.done" and event.item.type == "function_call":
            call = event.item
    return {"name": call.name, "arguments": arguments, "whole": call.arguments, "id": call.call_id, "kinds": kinds}


@step
def response_tool_round_trip():
    first = client.responses.create(
        model=MODEL, temperature=0, input=TOOL_CHAT, tools=[RESPONSE_TOOL], tool_choice="required"
    )
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": FLOW["tool_result"]}
        for item in first.output
        if item.type == "function_call"
    ]
    answer = client.responses.create(
        input=[*TOOL_CHAT, *first.output, *results], tools=[RESPONSE_TOOL], tool_choice="none", **RESPOND
    )
    return {"text": answer.output_text}


@step
def response_structured():
    answer = client.responses.parse(input=CHAT, text_format=Plant, model=MODEL, temperature=0)
    return {"object": answer.output_parsed.model_dump()}


@step
def refused():
    """An error of the server arrives as the client's own exception, with the field's name."""
    from openai import BadRequestError, NotFoundError

    seen = {}
    try:
        client.chat.completions.create(messages=CHAT, **{**GREEDY, "temperature": 9})
    except BadRequestError as error:
        seen["param"] = error.param
    try:
        client.chat.completions.create(messages=CHAT, **{**GREEDY, "model": "no such model"})
    except NotFoundError as error:
        seen["code"] = error.code
    return seen


run()
