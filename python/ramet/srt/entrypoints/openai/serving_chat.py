"""Owns POST /v1/chat/completions: messages to a prompt, and its outputs to OpenAI's answer and stream."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ramet.srt.entrypoints.http.event_stream import event_stream, json_response, until_disconnect
from ramet.srt.entrypoints.openai.chat_prompt import is_large_chat, render_chat
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest
from ramet.srt.entrypoints.openai.serving_base import (
    OpenAIServing,
    StreamUsage,
    answer_head,
    openai_names,
    prompt_logprobs,
    token_text,
    usage,
)
from ramet.srt.errors import RequestError
from ramet.srt.managers.generation import RunningSequence
from ramet.srt.managers.prepare_requests import SequenceInput
from ramet.srt.text.tokenizer import Tokenizer


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
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs", param="top_logprobs")
        with openai_names(body):
            prompt = await until_disconnect(request, self._input(body, is_large_chat(request)))
        if body.stream:
            head = answer_head("chat.completion.chunk", "chatcmpl", self.model_name)
            return await event_stream(request, self._stream(body, prompt, head))
        head = answer_head("chat.completion", "chatcmpl", self.model_name)
        return await until_disconnect(request, self._answer(body, prompt, head))

    async def _input(self, body: ChatCompletionRequest, is_large: bool) -> SequenceInput:
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        has_prompt_logprobs = body.prompt_logprobs is not None
        return SequenceInput(
            text=await render_chat(self.manager, body.messages, body, is_large),
            add_special_tokens=bool(body.add_special_tokens),  # the template has written them
            sampling_params=self.sampling_params(body, max_tokens),
            fit_max_new_tokens=max_tokens is None,
            return_logprob=bool(body.logprobs) or has_prompt_logprobs,
            logprob_start_len=0 if has_prompt_logprobs else -1,
            top_logprobs_num=max(body.top_logprobs or 0, body.prompt_logprobs or 0),
            stream=bool(body.stream),
            priority=body.priority or 0,
            param="messages",
        )

    async def _answer(self, body: ChatCompletionRequest, prompt: SequenceInput, head: dict[str, Any]) -> Response:
        with openai_names(body):
            generation = await self.start(body, [prompt])
            sequences = await generation.finish()
        choices = []
        for index, sequence in enumerate(sequences):
            await asyncio.sleep(0)  # others have the event loop, too
            choices.append(self._choice(body, index, sequence))
        answer = {**head, "choices": choices, "usage": usage(sequences, len(sequences))}
        if body.prompt_logprobs is not None:
            tokenizer, logprobs = self.manager.tokenizer, sequences[0].input_logprobs
            answer["prompt_logprobs"] = prompt_logprobs(tokenizer, logprobs, body.prompt_logprobs)
        if body.return_token_ids:
            answer["prompt_token_ids"] = sequences[0].request.input_ids
        return json_response(answer)

    def _choice(self, body: ChatCompletionRequest, index: int, sequence: RunningSequence) -> dict[str, Any]:
        assert sequence.finish_reason is not None
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": sequence.text, "refusal": None},
            "logprobs": self._logprobs(body, sequence, 0, len(sequence.output_ids)),
            "finish_reason": sequence.finish_reason.type,
        }
        if body.return_token_ids:
            choice["token_ids"] = sequence.output_ids
        return choice

    async def _stream(
        self, body: ChatCompletionRequest, prompt: SequenceInput, head: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        with openai_names(body):
            generation = await self.start(body, [prompt])
            sequences = generation.sequences
            stream_usage = StreamUsage(body, sequences, len(sequences))
            begun = [False] * len(sequences)
            has_ids = bool(body.return_token_ids)
            async with aclosing(generation.updates()) as updates:
                async for update in updates:
                    index, sequence = update.index, sequences[update.index]
                    logprobs = self._logprobs(body, sequence, update.first_token, update.end_token)
                    if not begun[index]:
                        first = _chunk(head, index, {"role": "assistant", "content": "", "refusal": None})
                        if has_ids and not any(begun):
                            first["prompt_token_ids"] = sequence.request.input_ids
                        begun[index] = True
                        yield stream_usage.on(first)
                    new_ids = sequence.output_ids[update.first_token : update.end_token] if has_ids else None
                    if update.text or logprobs or new_ids:
                        chunk = _chunk(head, index, {"content": update.text}, logprobs=logprobs, token_ids=new_ids)
                        yield stream_usage.on(chunk)
                    if update.finish_reason is not None:
                        yield stream_usage.on(_chunk(head, index, {}, finish_reason=update.finish_reason.type))
            if stream_usage.is_last:
                yield stream_usage.last(head)

    def _logprobs(
        self, body: ChatCompletionRequest, sequence: RunningSequence, first: int, end: int
    ) -> dict[str, Any] | None:
        """Of the output tokens [first, end); None when there is nothing to show."""
        if not body.logprobs or first == end:
            return None
        tokenizer, logprobs, num_top = self.manager.tokenizer, sequence.output_logprobs, body.top_logprobs or 0
        content = []
        for place in range(first, end):
            top = zip(logprobs.top_token_ids[place][:num_top], logprobs.top_logprobs[place][:num_top], strict=True)
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
    token_ids: list[int] | None = None,
) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    if token_ids is not None:
        choice["token_ids"] = token_ids
    return {**head, "choices": [choice]}
