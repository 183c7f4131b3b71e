"""Owns what litellm is asked to do, as its users name a server that speaks OpenAI's API."""

import litellm
from steps import FLOW, MODEL, URL, run, step

litellm.suppress_debug_info = True
TARGET = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none", "max_retries": 0}
OPENAI = {**TARGET, "model": f"openai/{MODEL}"}
CHAT = [{"role": "system", "content": FLOW["system"]}, {"role": "user", "content": FLOW["question"]}]
GREEDY = {"temperature": 0, "max_tokens": FLOW["max_tokens"]}
TOOL_CHAT = [{"role": "user", "content": FLOW["tool_question"]}]
ASK_TOOL = {
    "temperature": 0,
    "max_tokens": FLOW["max_object_tokens"],
    "tools": [{"type": "function", "function": FLOW["tool"]}],
}


@step
def chat():
    answer = litellm.completion(messages=CHAT, **OPENAI, **GREEDY)
    return {"text": answer.choices[0].message.content, "finish_reason": answer.choices[0].finish_reason}


@step
def chat_hosted_vllm():
    return {"text": litellm.completion(messages=CHAT, **TARGET, **GREEDY).choices[0].message.content}


@step
def chat_stream():
    chunks = list(
        litellm.completion(messages=CHAT, stream=True, stream_options={"include_usage": True}, **OPENAI, **GREEDY)
    )
    whole = litellm.stream_chunk_builder(chunks, messages=CHAT)
    return {"text": whole.choices[0].message.content, "usage": whole.usage.completion_tokens}


@step
async def chat_async():
    answer = await litellm.acompletion(messages=CHAT, **OPENAI, **GREEDY)
    return {"text": answer.choices[0].message.content}


@step
def chat_sent_back():
    first = litellm.completion(messages=CHAT, **OPENAI, **GREEDY).choices[0].message
    history = [*CHAT, first.model_dump(), {"role": "user", "content": FLOW["follow_up"]}]
    return {"text": litellm.completion(messages=history, **OPENAI, **GREEDY).choices[0].message.content}


@step
def completion():
    target = {**OPENAI, "model": f"text-completion-openai/{MODEL}"}
    return {"text": litellm.text_completion(prompt=FLOW["prompt"], **target, **GREEDY).choices[0].text}


@step
def tool_required():
    answer = litellm.completion(messages=TOOL_CHAT, tool_choice="required", **OPENAI, **ASK_TOOL)
    call = answer.choices[0].message.tool_calls[0]
    return {"name": call.function.name, "arguments": call.function.arguments, "id": call.id}


@step
def tool_stream():
    chunks = list(litellm.completion(messages=TOOL_CHAT, tool_choice="required", stream=True, **OPENAI, **ASK_TOOL))
    call = litellm.stream_chunk_builder(chunks, messages=TOOL_CHAT).choices[0].message.tool_calls[0]
    return {"name": call.function.name, "arguments": call.function.arguments, "id": call.id}


@step
def tool_round_trip():
    first = litellm.completion(messages=TOOL_CHAT, tool_choice="required", **OPENAI, **ASK_TOOL).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": FLOW["tool_result"]}
        for call in first.tool_calls
    ]
    answer = litellm.completion(
        messages=[*TOOL_CHAT, first.model_dump(), *results], tool_choice="none", **OPENAI, **{**ASK_TOOL, **GREEDY}
    )
    return {"text": answer.choices[0].message.content}


@step
def tool_auto():
    answer = litellm.completion(messages=TOOL_CHAT, **OPENAI, **ASK_TOOL)
    return {"finish_reason": answer.choices[0].finish_reason}


@step
def structured():
    form = {"type": "json_schema", "json_schema": {"name": "plant", "strict": True, "schema": FLOW["schema"]}}
    answer = litellm.completion(
        messages=CHAT, response_format=form, temperature=0, max_tokens=FLOW["max_object_tokens"], **OPENAI
    )
    return {"text": answer.choices[0].message.content}


@step
def response():
    answer = litellm.responses(
        input=FLOW["question"],
        instructions=FLOW["system"],
        temperature=0,
        max_output_tokens=FLOW["max_tokens"],
        **OPENAI,
    )
    return {"text": answer.output_text}


@step
async def message():
    """Anthropic's API through litellm, which speaks chat to the server."""
    answer = await litellm.anthropic.messages.acreate(
        messages=CHAT[1:], system=FLOW["system"], **GREEDY, **{**TARGET, "max_retries": None}
    )
    return {"text": "".join(block["text"] for block in answer["content"] if block["type"] == "text")}


run()
