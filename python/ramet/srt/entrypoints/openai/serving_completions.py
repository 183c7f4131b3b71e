"""Owns POST /v1/completions: prompts to sequences, and their outputs to OpenAI's answer and stream."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ramet.srt.entrypoints.http.event_stream import event_stream, json_response, until_disconnect
from ramet.srt.entrypoints.openai.constraints import BodyConstraint, constraint_of_body
from ramet.srt.entrypoints.openai.protocol import CompletionRequest
from ramet.srt.entrypoints.openai.serving_base import (
    OpenAIServing,
    StreamUsage,
    answer_head,
    openai_names,
    prompt_logprobs,
    sglext,
    token_name,
    token_text,
    usage,
    version_metadata,
)
from ramet.srt.managers.generation import RunningSequence, Update
from ramet.srt.managers.io_struct import TokenLogprobs
from ramet.srt.managers.prepare_requests import SequenceInput
from ramet.srt.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16


class CompletionServing(OpenAIServing):
    """The completions route of one instance."""

    async def create(self, body: CompletionRequest, request: Request) -> Response:
        """Answer `body`.

        Raises:
            RequestError: if it can't be served.
            ServiceError: if the instance can't serve it.
            ClientGone: if the client goes away first.
        """
        self.check_body(body)
        constraint = constraint_of_body(body)
        with openai_names(constraint):
            inputs = self._inputs(body, constraint)
        head = answer_head("text_completion", "cmpl", self.model_name)
        if body.stream:
            return await event_stream(request, self._stream(body, inputs, constraint, head))
        return await until_disconnect(request, self._answer(body, inputs, constraint, head))

    def _inputs(self, body: CompletionRequest, constraint: BodyConstraint | None) -> list[SequenceInput]:
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        params = self.sampling_params(body, max_tokens, constraint)
        has_prompt_logprobs = body.prompt_logprobs is not None
        return [
            SequenceInput(
                text=prompt if isinstance(prompt, str) else None,
                input_ids=None if isinstance(prompt, str) else prompt,
                sampling_params=params,
                fit_max_new_tokens=body.max_tokens is None,
                add_special_tokens=body.add_special_tokens is not False,
                return_logprob=body.logprobs is not None or has_prompt_logprobs,
                logprob_start_len=0 if has_prompt_logprobs or (body.echo and body.logprobs is not None) else -1,
                top_logprobs_num=max(body.logprobs or 0, body.prompt_logprobs or 0),
                stream=bool(body.stream),
                priority=body.priority or 0,
                param="prompt",
            )
            for prompt in _prompts(body)
        ]

    async def _answer(
        self,
        body: CompletionRequest,
        inputs: list[SequenceInput],
        constraint: BodyConstraint | None,
        head: dict[str, Any],
    ) -> Response:
        with openai_names(constraint):
            generation = await self.start(body, inputs)
            sequences = await generation.finish()
        choices = []
        for index, sequence in enumerate(sequences):
            await asyncio.sleep(0)  # others have the event loop, too
            writer = ChoiceWriter(body, self.manager.tokenizer, sequence, self._echo(body, inputs, index))
            choice = writer.choice(index, sequence.text, 0, len(sequence.output_ids))
            if body.prompt_logprobs is not None:
                logprobs = sequence.input_logprobs
                choice["prompt_logprobs"] = prompt_logprobs(self.manager.tokenizer, logprobs, body.prompt_logprobs)
            choices.append(choice)
        answer = {
            **head,
            "choices": choices,
            "usage": usage(sequences, body.n or 1),
            "metadata": version_metadata(sequences),
        }
        if body.return_cached_tokens_details:
            answer["sglext"] = sglext(sequences, body.n or 1)
        return json_response(answer)

    async def _stream(
        self,
        body: CompletionRequest,
        inputs: list[SequenceInput],
        constraint: BodyConstraint | None,
        head: dict[str, Any],
    ) -> AsyncGenerator[dict[str, Any], None]:
        with openai_names(constraint):
            generation = await self.start(body, inputs)
            stream_usage = StreamUsage(body, generation.sequences, body.n or 1)
            writers = [
                ChoiceWriter(body, self.manager.tokenizer, sequence, self._echo(body, inputs, index))
                for index, sequence in enumerate(generation.sequences)
            ]
            async with aclosing(generation.updates()) as updates:
                async for update in updates:
                    writer = writers[update.index]
                    if writer.has_news(update):
                        choice = writer.choice(update.index, update.text, update.first_token, update.end_token)
                        event = {**head, "choices": [choice]}
                        if choice["finish_reason"] is not None:
                            event["metadata"] = version_metadata([generation.sequences[update.index]])
                        yield stream_usage.on(event)
            for event in stream_usage.last(head):
                yield event

    def _echo(self, body: CompletionRequest, inputs: list[SequenceInput], index: int) -> str:
        """The prompt's text in front of output `index`; "" without echo."""
        if not body.echo:
            return ""
        prompt = inputs[index // (body.n or 1)]
        return prompt.text if prompt.text is not None else self.manager.tokenizer.decode(prompt.input_ids or [])


class ChoiceWriter:
    """Writes one choice, or the pieces of one: the prompt's echo comes with the first piece."""

    def __init__(self, body: CompletionRequest, tokenizer: Tokenizer, sequence: RunningSequence, echo: str):
        self._body = body
        self._tokenizer = tokenizer
        self._sequence = sequence
        self._echo = echo
        self._is_first = True
        self._offset = 0

    def has_news(self, update: Update) -> bool:
        """Whether the update has something to show: the text may be held back."""
        shows_tokens = self._body.logprobs is not None or self._body.return_token_ids
        has_tokens = shows_tokens and update.end_token > update.first_token
        return bool(update.text or update.finish_reason or has_tokens or (self._is_first and self._echo))

    def choice(self, index: int, text: str, first_token: int, end_token: int) -> dict[str, Any]:
        """A choice with `text` and the output tokens [first_token, end_token)."""
        reason = self._sequence.finish_reason
        is_last = reason is not None and end_token == len(self._sequence.output_ids)
        logprobs = None if self._body.logprobs is None else self._logprobs(first_token, end_token)
        choice: dict[str, Any] = {
            "index": index,
            "text": self._echo + text if self._is_first else text,
            "logprobs": logprobs,
            "finish_reason": reason.type if is_last and reason is not None else None,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = self._sequence.output_ids[first_token:end_token]
            if self._is_first:
                choice["prompt_token_ids"] = self._sequence.request.input_ids
        self._is_first = False
        return choice

    def _logprobs(self, first_token: int, end_token: int) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if self._is_first and self._body.echo:
            logprobs = self._sequence.input_logprobs
            self._add(columns, logprobs, 0, len(logprobs.token_ids))
        self._add(columns, self._sequence.output_logprobs, first_token, end_token)
        return columns

    def _add(self, columns: dict[str, list[Any]], logprobs: TokenLogprobs, first: int, end: int) -> None:
        num_top = self._body.logprobs or 0
        for place in range(first, end):
            text = token_text(self._tokenizer, logprobs.token_ids[place])
            name = self._name(logprobs.token_ids[place])
            top = {
                self._name(token_id): value
                for token_id, value in zip(
                    logprobs.top_token_ids[place][:num_top], logprobs.top_logprobs[place][:num_top], strict=True
                )
            }
            logprob = logprobs.logprobs[place]
            if num_top and logprob is not None:
                top.setdefault(name, logprob)  # as one more: the API's lists always have the token that is there
            columns["tokens"].append(name)
            columns["token_logprobs"].append(logprob)
            columns["top_logprobs"].append(top or None)
            columns["text_offset"].append(self._offset)
            self._offset += len(text)

    def _name(self, token_id: int) -> str:
        return token_name(self._tokenizer, token_id, as_id=self._body.return_tokens_as_token_ids)


def _prompts(body: CompletionRequest) -> list[str] | list[list[int]]:
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt
