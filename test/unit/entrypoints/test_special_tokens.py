"""Whether a prompt gets the model's special tokens: completions unless they say no, chats only if they say so."""

import asyncio
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from ramet.srt.configs.parser_config import ParserConfig
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from ramet.srt.entrypoints.openai.serving_chat import ChatServing
from ramet.srt.entrypoints.openai.serving_completions import CompletionServing
from ramet.srt.entrypoints.routes.tokenize import make_tokenize_router
from ramet.srt.managers.lora_registry import LoraRegistry
from ramet.srt.managers.prepare_requests import Limits
from ramet.srt.text.output_format import OutputFormat

LIMITS = Limits(vocab_size=9, max_req_len=99, has_eos=True, grammars=True)
MESSAGES = [{"role": "user", "content": "a"}]


class Tokenizer:
    """Writes 1 in front of what it encodes, if it is asked to."""

    chat_template = SimpleNamespace(render=lambda messages, **_: messages[0]["content"], whole_source="")
    special_ids_by_text: ClassVar[dict[str, int]] = {}

    def encode(self, _text: str, add_special_tokens: bool) -> list[int]:
        return [1, 7] if add_special_tokens else [7]


FORM: Any = OutputFormat(cast(Any, Tokenizer), ParserConfig())
MANAGER: Any = SimpleNamespace(tokenizer=Tokenizer(), limits=LIMITS, output_format=FORM, adapters=LoraRegistry())
INSTANCE: Any = SimpleNamespace(manager=MANAGER, server_args=SimpleNamespace(model_name="m"))


@pytest.mark.parametrize(("given", "completion", "chat"), [(None, True, False), (True, True, True), (False,) * 3])
async def test_special_tokens(given: bool | None, completion: bool, chat: bool) -> None:
    body = CompletionRequest.model_validate({"prompt": "a", "add_special_tokens": given})
    assert CompletionServing(MANAGER, "m")._inputs(body, None)[0].add_special_tokens is completion
    request = ChatCompletionRequest.model_validate({"messages": MESSAGES, "add_special_tokens": given})
    prepared = await ChatServing(MANAGER, "m").prepare(request, cast(Any, SimpleNamespace(scope={}, receive=_never)))
    assert prepared.prompt.add_special_tokens is chat
    route = next(route for route in make_tokenize_router(INSTANCE).routes if route.path == "/tokenize")
    for fields, adds in (({"prompt": "a"}, completion), ({"messages": MESSAGES}, chat)):
        tokenize_body = route.dependant.body_params[0].field_info.annotation.model_validate(
            fields | {"add_special_tokens": given}
        )
        answer = await route.endpoint(tokenize_body, SimpleNamespace(scope={}, receive=_never))
        assert (b"[1,7]" in answer.body) is adds


async def _never() -> Any:
    await asyncio.sleep(60)
