"""Chats wait for the processes of templates: small ones never for large ones, and nobody for who has left."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ramet.srt.configs.parser_config import ParserConfig
from ramet.srt.entrypoints.http.event_stream import ClientGone
from ramet.srt.entrypoints.http.http_body import NUM_BODY_BYTES
from ramet.srt.entrypoints.openai import serving_chat
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest
from ramet.srt.entrypoints.openai.serving_chat import ChatServing
from ramet.srt.managers.lora_registry import LoraRegistry
from ramet.srt.text.output_format import OutputFormat


class Template:
    """Renders at once, but for chats that say "wait": these when they may."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.num_begun = 0

    whole_source = ""

    def render(self, messages: Any, **_options: Any) -> str:
        self.num_begun += 1
        if messages[0]["content"] == "wait":
            self.may_end.wait(10)
        raise ValueError("rendered")  # far enough


def chat(template: Template, text: str, num_bytes: int, has_left: bool = False, **fields: Any) -> "asyncio.Task[Any]":
    tokenizer: Any = SimpleNamespace(chat_template=template, special_ids_by_text={})
    output_format = OutputFormat(tokenizer, ParserConfig(tool_call_parser="hermes"))
    manager: Any = SimpleNamespace(tokenizer=tokenizer, output_format=output_format, adapters=LoraRegistry())
    body = ChatCompletionRequest.make(model="m", messages=[{"role": "user", "content": text}], **fields)

    async def receive() -> Any:
        if not has_left:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    request: Any = SimpleNamespace(scope={NUM_BODY_BYTES: num_bytes}, receive=receive)
    return asyncio.create_task(ChatServing(manager, "m").create(body, request))


async def test_small_chats_do_not_wait_for_large_ones_nor_for_who_has_left() -> None:
    template = Template()
    large = [chat(template, "wait", 1 << 20) for _ in range(70)]
    await asyncio.sleep(0.05)
    num_begun = template.num_begun
    try:
        with pytest.raises(ValueError, match="rendered"):
            await asyncio.wait_for(chat(template, "small", 100), 5)
        for _ in range(10):
            with pytest.raises(ClientGone):
                await asyncio.wait_for(chat(template, "wait", 1 << 20, has_left=True), 5)
    finally:
        template.may_end.set()
    await asyncio.gather(*large, return_exceptions=True)
    assert num_begun < 70 and template.num_begun == 71


@pytest.mark.parametrize("num_bytes", [100, 1 << 20])
async def test_large_tools_are_read_in_a_thread(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def constrain(*_args: Any) -> Any:
        threads.append(threading.current_thread())
        raise ValueError("constrained")

    monkeypatch.setattr(serving_chat, "constrain", constrain)
    monkeypatch.setattr(Template, "render", lambda *_args, **_options: "prompt")
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(ValueError, match="constrained"):
        await chat(Template(), "a", num_bytes, tools=[tool])
    (thread,) = threads
    assert (thread is threading.main_thread()) is (num_bytes == 100)
