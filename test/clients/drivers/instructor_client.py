"""Owns what instructor is asked to do: an object out of a chat, in each of its ways that fit an OpenAI-like server."""

from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel
from steps import FLOW, MODEL, URL, run, step

CHAT = [{"role": "system", "content": FLOW["system"]}, {"role": "user", "content": FLOW["question"]}]


class Plant(BaseModel, extra="forbid"):
    """A plant."""

    plant: Literal["oak", "fern", "moss"]
    edible: bool


def ask(mode, response_model=Plant):
    client = instructor.from_openai(OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0), mode=mode)
    return client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        response_model=response_model,
        temperature=0,
        max_tokens=FLOW["max_object_tokens"],
        max_retries=0,
    )


@step
def tools():
    """The default: a function call by name."""
    return {"object": ask(instructor.Mode.TOOLS).model_dump()}


@step
def tools_strict():
    return {"object": ask(instructor.Mode.TOOLS_STRICT).model_dump()}


@step
def json_schema():
    return {"object": ask(instructor.Mode.JSON_SCHEMA).model_dump()}


@step
def partial_stream():
    client = instructor.from_openai(OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0))
    parts = client.chat.completions.create_partial(
        model=MODEL,
        messages=CHAT,
        response_model=Plant,
        temperature=0,
        max_tokens=FLOW["max_object_tokens"],
        max_retries=0,
    )
    return {"object": list(parts)[-1].model_dump()}


run()
