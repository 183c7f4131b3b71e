"""Owns POST /v1/chat/completions: messages to a prompt, and its outputs to OpenAI's answer and stream."""

import asyncio
import functools
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ramet.srt.entrypoints.http.event_stream import event_stream, json_response, until_disconnect
from ramet.srt.entrypoints.http.http_body import NUM_BODY_BYTES
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest, ChatMessage, JsonSchemaFormat
from ramet.srt.entrypoints.openai.serving_base import OpenAIServing, answer_head, token_text, usage
from ramet.srt.errors import RequestError
from ramet.srt.managers.generation import RunningSequence
from ramet.srt.managers.prepare_requests import SequenceInput
from ramet.srt.text.template_process import SMALL_BYTES
from ramet.srt.text.tokenizer import Tokenizer

TEMPLATE_OWN_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "self"}
)
ANY_OBJECT = {"type": "object"}
# They only wait for other processes: these for those of small chats, which must not wait for large ones. A chat is less
# than six times as long on its way to a process as it is in the body.
RENDER_THREADS = {is_large: ThreadPoolExecutor(64, f"chat template {is_large=}") for is_large in (False, True)}
MAX_SMALL_BODY_BYTES = SMALL_BYTES // 6


class ChatServing(OpenAIServing):
    """The chat route of one instance."""

    async def create(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer `body`.

        Raises:
            RequestError: if it can't be served.
            ServiceError: if the instance can't serve it.
            ClientGone: if the client goes away first.
        """
        self.check_body(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs", param="top_logprobs")
        is_large = request.scope.get(NUM_BODY_BYTES, 0) > MAX_SMALL_BODY_BYTES
        prompt = await until_disconnect(request, self._input(body, is_large))
        if body.stream:
            head = answer_head("chat.completion.chunk", "chatcmpl", self.model_name)
            return await event_stream(request, self._stream(body, prompt, head))
        head = answer_head("chat.completion", "chatcmpl", self.model_name)
        return await until_disconnect(request, self._answer(body, prompt, head))

    async def _input(self, body: ChatCompletionRequest, is_large: bool) -> SequenceInput:
        max_tokens = body.max_completion_tokens or body.max_tokens
        return SequenceInput(
            text=await self._prompt(body, is_large),
            add_special_tokens=False,  # the template has written them
            sampling_params=self.sampling_params(body, max_tokens, _json_schema(body)),
            fit_max_new_tokens=max_tokens is None,
            return_logprob=bool(body.logprobs),
            top_logprobs_num=body.top_logprobs or 0,
            stream=bool(body.stream),
            param="messages",
        )

    async def _prompt(self, body: ChatCompletionRequest, is_large: bool) -> str:
        template = self.manager.tokenizer.chat_template
        if template is None:
            raise RequestError("the model has no chat template; start with --chat-template FILE", param="messages")
        extra = body.chat_template_kwargs or {}
        taken = TEMPLATE_OWN_NAMES.intersection(extra)
        if taken:
            raise RequestError(f"chat_template_kwargs can't set {sorted(taken)[0]!r}", param="chat_template_kwargs")
        messages = [_template_message(message) for message in body.messages]
        continues = bool(body.continue_final_message)
        render = functools.partial(template.render, messages, continue_final_message=continues, **extra)
        return await asyncio.get_running_loop().run_in_executor(RENDER_THREADS[is_large], render)

    async def _answer(self, body: ChatCompletionRequest, prompt: SequenceInput, head: dict[str, Any]) -> Response:
        generation = await self.start([prompt])
        sequences = await generation.finish()
        choices = []
        for index, sequence in enumerate(sequences):
            await asyncio.sleep(0)  # others have the event loop, too
            choices.append(self._choice(body, index, sequence))
        return json_response({**head, "choices": choices, "usage": usage(sequences, len(sequences))})

    def _choice(self, body: ChatCompletionRequest, index: int, sequence: RunningSequence) -> dict[str, Any]:
        assert sequence.finish_reason is not None
        return {
            "index": index,
            "message": {"role": "assistant", "content": sequence.text, "refusal": None},
            "logprobs": self._logprobs(body, sequence, 0, len(sequence.output_ids)),
            "finish_reason": sequence.finish_reason.type,
        }

    async def _stream(
        self, body: ChatCompletionRequest, prompt: SequenceInput, head: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        generation = await self.start([prompt])
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        if include_usage:
            head["usage"] = None
        begun = [False] * len(generation.sequences)
        async with aclosing(generation.updates()) as updates:
            async for update in updates:
                index = update.index
                logprobs = self._logprobs(body, generation.sequences[index], update.first_token, update.end_token)
                if not begun[index]:
                    begun[index] = True
                    yield _chunk(head, index, {"role": "assistant", "content": "", "refusal": None})
                if update.text or logprobs:
                    yield _chunk(head, index, {"content": update.text}, logprobs=logprobs)
                if update.finish_reason is not None:
                    yield _chunk(head, index, {}, finish_reason=update.finish_reason.type)
        if include_usage:
            yield {**head, "choices": [], "usage": usage(generation.sequences, len(generation.sequences))}

    def _logprobs(
        self, body: ChatCompletionRequest, sequence: RunningSequence, first: int, end: int
    ) -> dict[str, Any] | None:
        """Of the output tokens [first, end); None when there is nothing to show."""
        if not body.logprobs or first == end:
            return None
        tokenizer, logprobs = self.manager.tokenizer, sequence.output_logprobs
        content = []
        for place in range(first, end):
            top = zip(logprobs.top_token_ids[place], logprobs.top_logprobs[place], strict=True)
            entry = _token_entry(tokenizer, logprobs.token_ids[place], logprobs.logprobs[place])
            content.append({**entry, "top_logprobs": [_token_entry(tokenizer, *pair) for pair in top]})
        return {"content": content, "refusal": None}


def _token_entry(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    text = token_text(tokenizer, token_id)
    return {"token": text, "logprob": logprob, "bytes": list(tokenizer.token_bytes(token_id))}


def _chunk(
    head: dict[str, Any],
    index: int,
    delta: dict[str, Any],
    *,
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return {**head, "choices": [choice]}


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """A message as templates expect it, with "developer" by the name that they know."""
    fields = message.model_dump(exclude_none=True)
    if message.role == "developer":
        fields["role"] = "system"
    if not fields.get("tool_calls"):
        fields.pop("tool_calls", None)
    return fields


def _json_schema(body: ChatCompletionRequest) -> dict[str, Any] | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    return wanted.json_schema.json_schema if isinstance(wanted, JsonSchemaFormat) else ANY_OBJECT
