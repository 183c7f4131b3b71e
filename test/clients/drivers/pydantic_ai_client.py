"""Owns what pydantic-ai is asked to do: with its chat, responses and Anthropic models."""

from typing import Literal

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from steps import FLOW, MODEL, URL, run, step


class Plant(BaseModel, extra="forbid"):
    """A plant."""

    plant: Literal["oak", "fern", "moss"]
    edible: bool


def chat_model():
    """A new one for each step, since each step has its own event loop."""
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    return OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client))


def response_model():
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    return OpenAIResponsesModel(MODEL, provider=OpenAIProvider(openai_client=client))


def message_model():
    client = AsyncAnthropic(base_url=URL, api_key="none", max_retries=0)
    return AnthropicModel(MODEL, provider=AnthropicProvider(anthropic_client=client))


def agent(model, max_tokens=FLOW["max_tokens"], **options):
    return Agent(
        model, system_prompt=FLOW["system"], model_settings={"temperature": 0, "max_tokens": max_tokens}, **options
    )


async def streamed(model):
    async with agent(model).run_stream(FLOW["question"]) as result:
        text = ""
        async for piece in result.stream_text(delta=True, debounce_by=None):
            text += piece
    return {"text": text}


async def by_output_tool(model):
    """The agent must end by calling the output's tool, after it may call others: pydantic-ai asks for "required"."""
    one = agent(model, FLOW["max_object_tokens"], output_type=ToolOutput(Plant))
    result = await one.run(FLOW["question"])
    return {"object": result.output.model_dump(), "kinds": [part.part_kind for part in result.all_messages()[1].parts]}


@step
async def chat():
    result = await agent(chat_model()).run(FLOW["question"])
    return {"text": result.output, "usage": [result.usage.input_tokens, result.usage.output_tokens]}


@step
async def chat_stream():
    return await streamed(chat_model())


@step
async def chat_sent_back():
    one = agent(chat_model())
    first = await one.run(FLOW["question"])
    return {"text": (await one.run(FLOW["follow_up"], message_history=first.all_messages())).output}


@step
async def structured():
    """By a JSON schema."""
    one = agent(chat_model(), FLOW["max_object_tokens"], output_type=NativeOutput(Plant))
    return {"object": (await one.run(FLOW["question"])).output.model_dump()}


@step
async def structured_by_call():
    return await by_output_tool(chat_model())


@step
async def tool_round_trip():
    """A history in which a tool was called and gave its result is sent back; the answer is a text."""
    from pydantic_ai.messages import ModelRequest, ModelResponse, ToolCallPart, ToolReturnPart, UserPromptPart

    one = agent(chat_model())

    @one.tool_plain
    def get_weather(city: Literal["Oslo", "Lima", "Cairo"], days: Literal[1, 2, 3]) -> str:
        """The weather of a city."""
        return FLOW["tool_result"]

    arguments = {"city": "Oslo", "days": 1}
    history = [
        ModelRequest(parts=[UserPromptPart(FLOW["tool_question"])]),
        ModelResponse(parts=[ToolCallPart("get_weather", arguments, tool_call_id="call_1")]),
        ModelRequest(parts=[ToolReturnPart("get_weather", FLOW["tool_result"], tool_call_id="call_1")]),
    ]
    return {"text": (await one.run(FLOW["follow_up"], message_history=history)).output}


@step
async def response():
    return {"text": (await agent(response_model()).run(FLOW["question"])).output}


@step
async def response_stream():
    return await streamed(response_model())


@step
async def response_structured_by_call():
    return await by_output_tool(response_model())


@step
async def message():
    return {"text": (await agent(message_model()).run(FLOW["question"])).output}


@step
async def message_stream():
    return await streamed(message_model())


@step
async def message_structured_by_call():
    return await by_output_tool(message_model())


run()
