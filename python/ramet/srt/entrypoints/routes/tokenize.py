"""Owns the routes that turn texts and chats into tokens and back, in the forms that vLLM and SGLang have in common."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from ramet.srt.entrypoints.http.answers import Detokenized, Tokenized
from ramet.srt.entrypoints.http.error_descriptions import ERRORS, NOT_FOUND
from ramet.srt.entrypoints.http.event_stream import json_response, until_disconnect
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.openai.chat_prompt import is_large_chat, render_chat
from ramet.srt.entrypoints.openai.protocol import DetokenizeRequest, TokenizeRequest
from ramet.srt.errors import RequestError
from ramet.srt.managers.prepare_requests import SLOW_CHARS
from ramet.srt.text.tokenizer import Tokenizer

MAX_CHARS = 4 << 20  # of one request's texts: some seconds of the library's time
MAX_TOKENS = 1 << 18  # of one request: while they are decoded nothing else runs, for some hundredths of a second
THREADS = ThreadPoolExecutor(2, "tokenize")

Result = TypeVar("Result")


def make_tokenize_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["native"], responses=ERRORS | NOT_FOUND)

    @router.post("/tokenize", responses={200: {"model": Tokenized}})
    @router.post("/v1/tokenize", responses={200: {"model": Tokenized}})
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """The tokens of a prompt, as requests would have them; of several as lists."""
        instance.manager.adapters.name_of(body.model, instance.server_args.model_name)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("exactly one of prompt and messages must be given", param="prompt")
        return await until_disconnect(request, _tokenize(instance, body, is_large_chat(request)))

    @router.post("/detokenize", responses={200: {"model": Detokenized}})
    @router.post("/v1/detokenize", responses={200: {"model": Detokenized}})
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """The text of tokens; of several lists as a list.

        Without `skip_special_tokens` the two names of the answer follow their origins: `text`, SGLang's, leaves special
        tokens out, and `prompt`, vLLM's, shows them.
        """
        instance.manager.adapters.name_of(body.model, instance.server_args.model_name)
        return await until_disconnect(request, _detokenize(instance, body))

    return router


async def _tokenize(instance: Instance, body: TokenizeRequest, is_large: bool) -> Response:
    manager = instance.manager
    prompt: Any = body.prompt
    if body.messages is not None:
        prompt = await render_chat(manager, body.messages, body, is_large)
    adds_special_tokens = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    texts: list[str] = [prompt] if isinstance(prompt, str) else prompt
    num_chars = sum(map(len, texts))
    if num_chars > MAX_CHARS:
        name = "prompt" if body.messages is None else "messages"
        raise RequestError(f"{name} has {num_chars} characters; at most {MAX_CHARS} are taken", param=name)

    def encode() -> tuple[list[list[int]], list[list[str]] | None]:
        ids = [manager.tokenizer.encode(text, adds_special_tokens) for text in texts]
        return ids, [_strings(manager.tokenizer, one) for one in ids] if body.return_token_strs else None

    ids, strings = await _run(encode, num_chars)
    is_single = isinstance(prompt, str)
    return json_response(
        {
            "tokens": ids[0] if is_single else ids,
            "count": len(ids[0]) if is_single else [len(one) for one in ids],
            "max_model_len": manager.limits.max_req_len,
            "token_strs": strings[0] if strings is not None and is_single else strings,
        }
    )


def _strings(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token(token_id) or "" for token_id in ids]


async def _detokenize(instance: Instance, body: DetokenizeRequest) -> Response:
    tokens: Any = body.tokens
    is_single = not tokens or isinstance(tokens[0], int)
    several: list[list[int]] = [tokens] if is_single else tokens
    num_tokens = sum(map(len, several))
    if num_tokens > MAX_TOKENS:
        raise RequestError(f"there are {num_tokens} tokens; at most {MAX_TOKENS} are taken", param="tokens")
    vocab_size = instance.manager.limits.vocab_size
    if any(ids and max(ids) >= vocab_size for ids in several):
        raise RequestError(f"tokens: token ids must be in [0, {vocab_size})", param="tokens")
    decode = instance.manager.tokenizer.decode
    skips = body.skip_special_tokens

    def decode_all() -> tuple[list[str], list[str]]:
        texts = [decode(ids, skip_special_tokens=skips is not False) for ids in several]
        return texts, texts if skips is not None else [decode(ids) for ids in several]

    texts, prompts = await _run(decode_all, num_tokens)
    return json_response({"text": texts[0] if is_single else texts, "prompt": prompts[0] if is_single else prompts})


async def _run(work: Callable[[], Result], size: int) -> Result:
    """The result of `work`, which is done in a thread where others would notice it."""
    if size <= SLOW_CHARS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(THREADS, work)
