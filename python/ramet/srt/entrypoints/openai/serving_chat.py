"""Owns POST /v1/chat/completions: messages to a prompt, and its outputs to OpenAI's answer and stream."""

import asyncio
import functools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ramet.srt.entrypoints.http.event_stream import event_stream, json_response, until_disconnect
from ramet.srt.entrypoints.openai.chat_prompt import is_large_chat, may_think, render_chat
from ramet.srt.entrypoints.openai.chat_run import ChatRun, FinishedChoice
from ramet.srt.entrypoints.openai.chat_tools import ChatTools, constrain, tools_of
from ramet.srt.entrypoints.openai.constraints import BodyConstraint, constraint_of_body
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest
from ramet.srt.entrypoints.openai.serving_base import (
    OpenAIServing,
    StreamUsage,
    answer_head,
    openai_names,
    prompt_logprobs,
    sglext,
    token_name,
    usage,
    version_metadata,
)
from ramet.srt.errors import RequestError
from ramet.srt.managers.generation import RunningSequence
from ramet.srt.managers.prepare_requests import SequenceInput, check_prompt_size
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.text.output_events import Content, Event, Reasoning, ToolCallStart
from ramet.srt.text.output_format import PromptEnd
from ramet.srt.text.output_parser import OutputParser
from ramet.srt.text.tokenizer import Tokenizer


class ChatServing(OpenAIServing):
    """The chat route of one instance."""

    def __init__(self, manager: TokenizerManager, model_name: str):
        super().__init__(manager, model_name)
        self._format = manager.output_format

    async def create(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer `body`.

        Raises:
            RequestError: if it can't be served.
            ServiceError: if the instance can't serve it.
            ClientGone: if the client goes away first.
        """
        chat = await self.prepare(body, request)
        if body.stream:
            head = answer_head("chat.completion.chunk", "chatcmpl", self.model_name)
            return await event_stream(request, self._stream(chat, head))
        head = answer_head("chat.completion", "chatcmpl", self.model_name)
        return await until_disconnect(request, self._answer(chat, head))

    async def prepare(self, body: ChatCompletionRequest, request: Request) -> "PreparedChat":
        """Check a chat and render it.

        Raises:
            RequestError, ServiceError, ClientGone: as `create`.
        """
        self.check_body(body)
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs", param="top_logprobs")
        tools, wanted = tools_of(body, self._format), constraint_of_body(body)
        rendering = render_chat(self.manager, body.messages, body, is_large_chat(request), with_tools=bool(tools.tools))
        text = await until_disconnect(request, rendering)
        end = PromptEnd(prompt=text, continued=_continued(body), may_think=may_think(body))
        write = functools.partial(constrain, tools, wanted, self._format, end)
        constraint, before = await asyncio.to_thread(write) if tools.tools and is_large_chat(request) else write()
        with openai_names(constraint):
            return PreparedChat(body, tools, end, constraint, self._input(body, tools, text, constraint, before))

    async def open(self, chat: "PreparedChat") -> ChatRun:
        """Start the choices of a chat.

        Raises:
            RequestError, ServiceError: as TokenizerManager.generate.
        """
        body = chat.body
        with openai_names(chat.constraint):
            generation = await self.start(body, [chat.prompt])

        def make_parser() -> OutputParser:
            return self._format.parser(
                chat.end,
                chat.tools.tools,
                max_calls=chat.tools.max_calls,
                separate_reasoning=body.separate_reasoning is not False,
                stream_reasoning=body.stream_reasoning is not False,
                skip_special_tokens=body.skip_special_tokens is not False,
            )

        return ChatRun(body, chat.constraint, generation, make_parser, self.manager)

    async def count_tokens(self, chat: "PreparedChat", request: Request) -> int:
        """Of the prompt.

        Raises:
            RequestError: if the context has no room for it.
            ClientGone: if the client goes away first.
        """
        prompt = chat.prompt
        text = prompt.text or ""
        check_prompt_size(text, prompt.param, self.manager.limits.max_req_len)
        return await until_disconnect(request, self.manager.count_tokens(text, prompt.add_special_tokens))

    def _input(
        self,
        body: ChatCompletionRequest,
        tools: ChatTools,
        text: str,
        constraint: BodyConstraint | None,
        before: str,
    ) -> SequenceInput:
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        has_prompt_logprobs = body.prompt_logprobs is not None
        params = self.sampling_params(body, max_tokens, constraint)
        if self._format.needs_special_tokens(bool(tools.tools)):
            params.skip_special_tokens = False  # the parser takes them out
        return SequenceInput(
            text=text,
            add_special_tokens=bool(body.add_special_tokens),  # the template has written them
            sampling_params=params,
            grammar_before=before,
            fit_max_new_tokens=max_tokens is None,
            return_logprob=bool(body.logprobs) or has_prompt_logprobs,
            logprob_start_len=0 if has_prompt_logprobs else -1,
            top_logprobs_num=max(body.top_logprobs or 0, body.prompt_logprobs or 0),
            stream=bool(body.stream),
            priority=body.priority or 0,
            param="messages",
        )

    async def _answer(self, chat: "PreparedChat", head: dict[str, Any]) -> Response:
        body, run = chat.body, await self.open(chat)
        choices = []
        for index, choice in enumerate(await run.finish()):
            await asyncio.sleep(0)  # others have the event loop, too
            choices.append(self._choice(body, index, choice))
        sequences = run.sequences
        counts = usage(sequences, len(sequences), run.num_reasoning_tokens())
        answer = {**head, "choices": choices, "usage": counts, "metadata": version_metadata(sequences)}
        if body.prompt_logprobs is not None:
            tokenizer, logprobs = self.manager.tokenizer, sequences[0].input_logprobs
            answer["prompt_logprobs"] = prompt_logprobs(tokenizer, logprobs, body.prompt_logprobs)
        if body.return_cached_tokens_details:
            answer["sglext"] = sglext(sequences, len(sequences))
        if body.return_token_ids:
            answer["prompt_token_ids"] = sequences[0].request.input_ids
        return json_response(answer)

    def _choice(self, body: ChatCompletionRequest, index: int, finished: FinishedChoice) -> dict[str, Any]:
        sequence = finished.sequence
        choice = {
            "index": index,
            "message": _message(finished),
            "logprobs": self.logprobs(body, sequence, 0, len(sequence.output_ids)),
            "finish_reason": finished.finish_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = sequence.output_ids
        return choice

    async def _stream(self, chat: "PreparedChat", head: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        body, run = chat.body, await self.open(chat)
        sequences = run.sequences
        stream_usage = StreamUsage(body, sequences, len(sequences), run.num_reasoning_tokens)
        begun = [False] * len(sequences)
        has_ids = bool(body.return_token_ids)
        async with aclosing(run.updates()) as updates:
            async for update in updates:
                index, sequence = update.index, sequences[update.index]
                logprobs = self.logprobs(body, sequence, update.first_token, update.end_token)
                if not begun[index]:
                    first = _chunk(head, index, {"role": "assistant", "content": "", "refusal": None})
                    if has_ids and not any(begun):
                        first["prompt_token_ids"] = sequence.request.input_ids
                    begun[index] = True
                    yield stream_usage.on(first)
                new_ids = sequence.output_ids[update.first_token : update.end_token] if has_ids else None
                deltas = [_delta(event) for event in update.events]
                if not deltas and (logprobs or new_ids):
                    deltas = [{"content": ""}]
                for delta in deltas:
                    yield stream_usage.on(_chunk(head, index, delta, logprobs=logprobs, token_ids=new_ids))
                    logprobs = new_ids = None
                if update.finish_reason is not None:
                    last = _chunk(head, index, {}, finish_reason=update.finish_reason)
                    yield stream_usage.on({**last, "metadata": version_metadata([sequence])})
        for event in stream_usage.last(head):
            yield event

    def logprobs(
        self, body: ChatCompletionRequest, sequence: RunningSequence, first: int, end: int
    ) -> dict[str, Any] | None:
        """Of the output tokens [first, end); None when there is nothing to show."""
        if not body.logprobs or first == end:
            return None
        logprobs, num_top = sequence.output_logprobs, body.top_logprobs or 0

        def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
            return _token_entry(self.manager.tokenizer, token_id, logprob, as_id=body.return_tokens_as_token_ids)

        content = []
        for place in range(first, end):
            top = zip(logprobs.top_token_ids[place][:num_top], logprobs.top_logprobs[place][:num_top], strict=True)
            there = entry(logprobs.token_ids[place], logprobs.logprobs[place])
            content.append({**there, "top_logprobs": [entry(*pair) for pair in top]})
        return {"content": content, "refusal": None}


@dataclass(frozen=True)
class PreparedChat:
    """A chat that can be started."""

    body: ChatCompletionRequest
    tools: ChatTools
    end: PromptEnd
    constraint: BodyConstraint | None
    prompt: SequenceInput


def _continued(body: ChatCompletionRequest) -> str | None:
    """The text that the output goes on with."""
    if not body.continue_final_message:
        return None
    content = body.messages[-1].content
    return content if isinstance(content, str) else "".join(part.text for part in content or [])


def _message(finished: FinishedChoice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": finished.content, "refusal": None}
    if finished.reasoning:
        message["reasoning_content"] = finished.reasoning
    if finished.tool_calls:
        message["content"] = finished.content or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in finished.tool_calls
        ]
    return message


def _delta(event: Event) -> dict[str, Any]:
    """What a chunk of a stream says of an event."""
    if isinstance(event, Content):
        return {"content": event.text}
    if isinstance(event, Reasoning):
        return {"reasoning_content": event.text}
    if isinstance(event, ToolCallStart):
        function = {"name": event.name, "arguments": ""}
        return {"tool_calls": [{"index": event.call_index, "id": event.id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": event.call_index, "function": {"arguments": event.text}}]}


def _token_entry(tokenizer: Tokenizer, token_id: int, logprob: float | None, *, as_id: bool | None) -> dict[str, Any]:
    name = token_name(tokenizer, token_id, as_id=as_id)
    return {"token": name, "logprob": logprob, "bytes": list(tokenizer.token_bytes(token_id))}


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
