"""Owns what OpenAI's Agents SDK is asked to do: over chat completions, and over responses, which is its default."""

from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel
from steps import FLOW, MODEL, URL, run, step

set_tracing_disabled(True)


class Plant(BaseModel, extra="forbid"):
    plant: Literal["oak", "fern", "moss"]
    edible: bool


@function_tool
def get_weather(city: Literal["Oslo", "Lima", "Cairo"], days: Literal[1, 2, 3]) -> str:
    """The weather of a city."""
    return FLOW["tool_result"]


def agent(kind, max_tokens=FLOW["max_tokens"], tool_choice=None, **options):
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    return Agent(
        name="Gardener",
        instructions=FLOW["system"],
        model=kind(MODEL, client),
        model_settings=ModelSettings(temperature=0, max_tokens=max_tokens, tool_choice=tool_choice),
        **options,
    )


async def told(kind):
    return {"text": (await Runner.run(agent(kind), FLOW["question"])).final_output}


async def told_in_pieces(kind):
    result = Runner.run_streamed(agent(kind), FLOW["question"])
    text = ""
    async for event in result.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            text += event.data.delta
    return {"text": text, "whole": result.final_output}


async def called(kind):
    """The first answer must call; the SDK runs the tool, sends its result back and lets the second one be a text."""
    result = await Runner.run(
        agent(kind, FLOW["max_object_tokens"], tool_choice="required", tools=[get_weather]),
        FLOW["tool_question"],
        max_turns=4,
    )
    return {"kinds": [item.type for item in result.new_items]}


async def called_in_pieces(kind):
    one = agent(
        kind,
        FLOW["max_object_tokens"],
        tool_choice="required",
        tools=[get_weather],
        tool_use_behavior="stop_on_first_tool",
    )
    result = Runner.run_streamed(one, FLOW["tool_question"])
    kinds = [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]
    return {"kinds": kinds, "output": result.final_output}


async def structured_by(kind):
    return {
        "object": (
            await Runner.run(agent(kind, FLOW["max_object_tokens"], output_type=Plant), FLOW["question"])
        ).final_output.model_dump()
    }


async def sent_back(kind):
    first = await Runner.run(agent(kind), FLOW["question"])
    history = [*first.to_input_list(), {"role": "user", "content": FLOW["follow_up"]}]
    return {"text": (await Runner.run(agent(kind), history)).final_output}


def flow(prefix, kind):
    for name, function in {
        "text": told,
        "stream": told_in_pieces,
        "tool_round_trip": called,
        "tool_stream": called_in_pieces,
        "structured": structured_by,
        "sent_back": sent_back,
    }.items():

        async def one(function=function):
            return await function(kind)

        one.__name__ = f"{prefix}{name}"
        step(one)


flow("chat_", OpenAIChatCompletionsModel)
flow("response_", OpenAIResponsesModel)
run()
