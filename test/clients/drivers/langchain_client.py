"""Owns what langchain-openai is asked to do, alone and in an agent of langgraph."""

from typing import Literal

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
from steps import FLOW, MODEL, URL, run, step

TARGET = {"base_url": f"{URL}/v1", "api_key": "none", "model": MODEL, "temperature": 0, "max_retries": 0}
chat_model = ChatOpenAI(max_tokens=FLOW["max_tokens"], **TARGET)
tool_model = ChatOpenAI(max_tokens=FLOW["max_object_tokens"], **TARGET)
response_model = ChatOpenAI(use_responses_api=True, max_tokens=FLOW["max_tokens"], **TARGET)
CHAT = [SystemMessage(FLOW["system"]), HumanMessage(FLOW["question"])]
TOOL_CHAT = [HumanMessage(FLOW["tool_question"])]


class Weather(BaseModel, extra="forbid"):
    """What the tool takes: with strict=True nothing else, so that a model that rambles comes to an end."""

    city: Literal["Oslo", "Lima", "Cairo"]
    days: Literal[1, 2, 3]


@tool(args_schema=Weather)
def get_weather(city: str, days: int) -> str:
    """The weather of a city."""
    return FLOW["tool_result"]


class Plant(BaseModel, extra="forbid"):
    """A plant."""

    plant: Literal["oak", "fern", "moss"]
    edible: bool


@step
def chat():
    answer = chat_model.invoke(CHAT)
    return {
        "text": answer.content,
        "finish_reason": answer.response_metadata["finish_reason"],
        "usage": answer.usage_metadata,
    }


@step
def chat_stream():
    return {"text": "".join(chunk.content for chunk in chat_model.stream(CHAT))}


@step
async def chat_async():
    return {"text": (await chat_model.ainvoke(CHAT)).content}


@step
def chat_batch():
    return {"texts": [answer.content for answer in chat_model.batch([CHAT, CHAT, CHAT])]}


@step
def chat_sent_back():
    return {"text": chat_model.invoke([*CHAT, chat_model.invoke(CHAT), HumanMessage(FLOW["follow_up"])]).content}


@step
def completion():
    return {"text": OpenAI(max_tokens=FLOW["max_tokens"], **TARGET).invoke(FLOW["prompt"])}


@step
def tool_required():
    call = tool_model.bind_tools([get_weather], tool_choice="required", strict=True).invoke(TOOL_CHAT).tool_calls[0]
    return {"name": call["name"], "arguments": call["args"], "id": call["id"]}


@step
def tool_stream():
    whole = None
    for chunk in tool_model.bind_tools([get_weather], tool_choice="get_weather", strict=True).stream(TOOL_CHAT):
        whole = chunk if whole is None else whole + chunk
    call = whole.tool_calls[0]
    return {"name": call["name"], "arguments": call["args"], "id": call["id"]}


@step
def tool_round_trip():
    first = tool_model.bind_tools([get_weather], tool_choice="required", strict=True).invoke(TOOL_CHAT)
    results = [ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"]) for call in first.tool_calls]
    answer = chat_model.bind_tools([get_weather], tool_choice="none").invoke([*TOOL_CHAT, first, *results])
    return {"text": answer.content}


@step
def tool_auto():
    answer = tool_model.bind_tools([get_weather]).invoke(TOOL_CHAT)
    return {"finish_reason": answer.response_metadata["finish_reason"]}


@step
def agent():
    """An agent of langgraph: it must call, is given the result, and is then ended by its limit of steps."""
    from langgraph.errors import GraphRecursionError
    from langgraph.graph import END, START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode

    must_call = tool_model.bind_tools([get_weather], tool_choice="required", strict=True)
    graph = StateGraph(MessagesState)
    graph.add_node("call", lambda state: {"messages": [must_call.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([get_weather]))
    graph.add_node("answer", lambda state: {"messages": [chat_model.invoke(state["messages"])]})
    graph.add_edge(START, "call")
    graph.add_edge("call", "tools")
    graph.add_edge("tools", "answer")
    graph.add_edge("answer", END)
    try:
        final = graph.compile().invoke({"messages": TOOL_CHAT}, {"recursion_limit": 8})
    except GraphRecursionError as error:
        return {"unended": str(error)}
    return {"kinds": [message.type for message in final["messages"]], "text": final["messages"][-1].content}


@step
def structured():
    """By a JSON schema, which is the default."""
    return {"object": tool_model.with_structured_output(Plant).invoke(CHAT).model_dump()}


@step
def structured_by_call():
    return {"object": tool_model.with_structured_output(Plant, method="function_calling").invoke(CHAT).model_dump()}


@step
def response():
    return {"text": response_model.invoke(CHAT).text}


@step
def response_stream():
    return {"text": "".join(chunk.text for chunk in response_model.stream(CHAT))}


@step
def response_tool():
    bound = ChatOpenAI(use_responses_api=True, max_tokens=FLOW["max_object_tokens"], **TARGET).bind_tools(
        [get_weather], tool_choice="required", strict=True
    )
    call = bound.invoke(TOOL_CHAT).tool_calls[0]
    return {"name": call["name"], "arguments": call["args"], "id": call["id"]}


run()
