"""What a chat says about reasoning, whatever name its template has for that."""

from typing import Any

import pytest
from ramet.srt.entrypoints.openai.chat_prompt import may_think
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest


@pytest.mark.parametrize(
    ("said", "thinks"),
    [
        ({}, True),
        ({"reasoning_effort": "minimal"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}, False),
        ({"chat_template_kwargs": {"style": "short"}, "reasoning_effort": "none"}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}, True),  # the template's, too
    ],
)
def test_whether_a_chat_leaves_it_to_the_model_to_reason(said: dict[str, Any], thinks: bool) -> None:
    chat = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "x"}]} | said)
    assert may_think(chat) is thinks
