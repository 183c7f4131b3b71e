"""Clients of the OpenAI and Anthropic APIs and the frameworks on top of them: each step of their drivers."""

from collections.abc import Callable
from typing import Any

import pytest
from clients import api_checks as expect
from clients.catalog import CLIENTS
from clients.client_run import ClientRun, run_driver
from clients.conftest import PlainAnswers
from server_process import ServerProcess

Check = Callable[[Any, PlainAnswers], None]

CHATS = {
    "chat": expect.chat,
    "chat_stream": expect.chat,
    "chat_sent_back": expect.sent_back,
}
TOOLS = {
    "tool_required": expect.call,
    "tool_stream": expect.call,
    "tool_auto": expect.goes_through,
}
STEPS: dict[str, dict[str, Check]] = {
    "openai_python.py": {
        **CHATS,
        **TOOLS,
        "models": expect.models,
        "chat_stream_helper": expect.chat,
        "chat_async": expect.chat,
        "chat_cut": expect.cut,
        "chat_parts": expect.chat,
        "chat_habits": expect.chat,
        "chat_logprobs": expect.logprobs,
        "completion": expect.completion,
        "completion_stream": expect.completion,
        "completion_scored": expect.scored,
        "tool_named": expect.call,
        "tool_round_trip": expect.text,
        "structured": expect.plant,
        "json_object": expect.json_text,
        "response": expect.response,
        "response_cut": expect.cut,
        "response_stream": expect.response_events,
        "response_stream_helper": expect.chat,
        "response_previous": expect.sent_back,
        "response_retrieve": expect.chat,
        "response_sent_back": expect.sent_back,
        "response_tool": expect.call,
        "response_tool_stream": expect.response_call_events,
        "response_tool_round_trip": expect.text,
        "response_structured": expect.plant,
        "refused": expect.refused,
    },
    "openai_node.mjs": {
        **CHATS,
        **TOOLS,
        "models": expect.models,
        "chat_stream_helper": expect.chat,
        "completion": expect.completion,
        "tool_runner": expect.called_twice,
        "structured": expect.plant,
        "response": expect.response,
        "response_stream": expect.response_events,
        "response_previous": expect.sent_back,
        "response_tool": expect.call,
        "response_structured": expect.plant,
    },
    "anthropic_python.py": {
        "models": expect.models,
        "message": expect.message,
        "message_events": expect.message_events,
        "message_stream": expect.chat,
        "message_async": expect.chat,
        "message_blocks": expect.chat,
        "message_cut": expect.cut,
        "message_sent_back": expect.sent_back,
        "message_stopped": expect.message_stopped,
        "count_tokens": expect.counted,
        "tool_any": expect.message_call,
        "tool_named": expect.message_call,
        "tool_stream": expect.message_call,
        "tool_round_trip": expect.text,
        "tool_auto": expect.goes_through,
        "structured": expect.plant,
        "refused": expect.message_refused,
    },
    "litellm_client.py": {
        **CHATS,
        **TOOLS,
        "chat_hosted_vllm": expect.chat,
        "chat_async": expect.chat,
        "completion": expect.completion,
        "tool_round_trip": expect.text,
        "structured": expect.plant,
        "response": expect.chat,
        "message": expect.chat,
    },
    "langchain_client.py": {
        **CHATS,
        **TOOLS,
        "chat_async": expect.chat,
        "chat_batch": expect.batch,
        "completion": expect.completion,
        "tool_round_trip": expect.text,
        "agent": expect.graph,
        "structured": expect.plant,
        "structured_by_call": expect.plant,
        "response": expect.chat,
        "response_stream": expect.chat,
        "response_tool": expect.call,
    },
    "pydantic_ai_client.py": {
        **CHATS,
        "structured": expect.plant,
        "structured_by_call": expect.plant,
        "tool_round_trip": expect.text,
        "response": expect.chat,
        "response_stream": expect.chat,
        "response_structured_by_call": expect.plant,
        "message": expect.chat,
        "message_stream": expect.chat,
        "message_structured_by_call": expect.plant,
    },
    "openai_agents.py": {
        f"{api}_{step}": check
        for api in ("chat", "response")
        for step, check in {
            "text": expect.chat,
            "stream": expect.chat,
            "tool_round_trip": expect.agent_called,
            "tool_stream": expect.agent_called_in_pieces,
            "structured": expect.plant,
            "sent_back": expect.sent_back,
        }.items()
    },
    "instructor_client.py": {
        "tools": expect.plant,
        "tools_strict": expect.plant,
        "json_schema": expect.plant,
        "partial_stream": expect.plant,
    },
    "ai_sdk.mjs": {
        f"{api}{step}": check
        for api in ("", "chat_")
        for step, check in {
            "text": expect.chat,
            "stream": expect.chat,
            "sent_back": expect.sent_back,
            "structured": expect.plant,
            "tool": expect.call,
            "tool_round_trip": expect.called_twice,
            "tool_stream": expect.call,
            "tool_auto": expect.goes_through,
        }.items()
    },
}


def client_of(driver: str) -> str:
    return driver.partition(".")[0]


class Runs:
    """Each driver is run once, when the first test asks for one of its steps."""

    def __init__(self, url: str):
        self._url = url
        self._done: dict[str, ClientRun | Exception] = {}

    def __call__(self, driver: str) -> ClientRun:
        if driver not in self._done:
            try:
                self._done[driver] = run_driver(driver, CLIENTS[client_of(driver)].group, self._url)
            except Exception as error:
                self._done[driver] = error
                raise
        run = self._done[driver]
        if isinstance(run, Exception):
            raise run
        return run


@pytest.fixture(scope="session")
def runs(server: ServerProcess) -> Runs:
    return Runs(server.url)


@pytest.mark.parametrize(
    ("driver", "step"), [(driver, step) for driver, steps in STEPS.items() for step in steps], ids=str
)
def test_step(driver: str, step: str, runs: Runs, plain: PlainAnswers, record_property: Callable[..., None]) -> None:
    record_property("client", client_of(driver))
    record_property("step", step)
    STEPS[driver][step](runs(driver).saw(step), plain)


@pytest.mark.parametrize("driver", STEPS)
def test_each_step_has_a_check(driver: str, runs: Runs) -> None:
    assert set(runs(driver).lines) == set(STEPS[driver])
