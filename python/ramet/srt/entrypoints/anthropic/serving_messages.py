"""Owns POST /v1/messages and /v1/messages/count_tokens: a conversation to a chat, and its output to a message."""

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ramet.srt.entrypoints.anthropic.conversion import chat_of, our_words
from ramet.srt.entrypoints.anthropic.error_shape import error_body_of
from ramet.srt.entrypoints.anthropic.message_events import MessageEvent, MessageEvents, whole_message
from ramet.srt.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest, ThinkingOn
from ramet.srt.entrypoints.http.event_stream import encode_named_event, event_stream, json_response, until_disconnect
from ramet.srt.entrypoints.openai.serving_base import version_metadata
from ramet.srt.entrypoints.openai.serving_chat import ChatServing, PreparedChat
from ramet.srt.errors import RequestError
from ramet.srt.managers.generation import RunningSequence

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesServing:
    """Anthropic's routes of one instance."""

    def __init__(self, chat: ChatServing):
        self._chat = chat

    async def create(self, body: MessagesRequest, request: Request) -> Response:
        """Answer `body`.

        Raises:
            RequestError: if it can't be served.
            ServiceError: if the instance can't serve it.
            ClientGone: if the client goes away first.
        """
        with our_words():
            chat = await self._chat.prepare(chat_of(body), request)
        events = self._events(body, chat)
        if body.stream:
            return await event_stream(request, events, encode=encode_named_event, encode_error=encode_error, last=b"")
        return await until_disconnect(request, _whole(events))

    async def count_tokens(self, body: CountTokensRequest, request: Request) -> Response:
        """How many tokens the prompt of `body` has. Raises what `create` raises."""
        with our_words():
            chat = await self._chat.prepare(chat_of(body), request)
            num_tokens = await self._chat.count_tokens(chat, request)
        return json_response({"input_tokens": num_tokens})

    async def _events(self, body: MessagesRequest, chat: PreparedChat) -> AsyncGenerator[MessageEvent, None]:
        """The message's events. The first come when the first token is there."""
        thinking = body.thinking
        is_omitted = isinstance(thinking, ThinkingOn) and thinking.display == "omitted"
        events = MessageEvents(shows_thinking=not is_omitted)
        has_begun = False
        with our_words():
            run = await self._chat.open(chat)
            sequence = run.sequences[0]
            async with aclosing(run.updates()) as updates:
                async for update in updates:
                    if not has_begun:
                        has_begun = True
                        for event in events.begin(self._beginning(sequence)):
                            yield event
                    for event in events.add(update.events):
                        yield event
                    if update.finish_reason is not None:
                        stop = stop_of(update.finish_reason, sequence)
                        details = {"thinking_tokens": run.num_reasoning_tokens(0)}
                        counts = {**usage(sequence), "output_tokens_details": details}
                        for event in events.end(*stop, counts, version_metadata(run.sequences)):
                            yield event

    def _beginning(self, sequence: RunningSequence) -> dict[str, Any]:
        return {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": self._chat.model_name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage(sequence),
        }


async def _whole(events: AsyncGenerator[MessageEvent, None]) -> Response:
    async with aclosing(events):
        return json_response(whole_message([event async for event in events]))


def usage(sequence: RunningSequence) -> dict[str, int]:
    """Token counts so far. The prompt's tokens that the prefix cache had are not among `input_tokens`."""
    return {
        "input_tokens": sequence.prompt_tokens - sequence.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": sequence.cached_tokens,
        "output_tokens": len(sequence.output_ids),
    }


def stop_of(finish_reason: str, sequence: RunningSequence) -> tuple[str, str | None]:
    """Anthropic's word for a chat's finish reason, and the stop sequence that was found.

    Raises:
        RequestError: if the request was aborted, for which there is no word.
    """
    if finish_reason not in STOP_REASONS:
        raise RequestError("the request was aborted", code="aborted")
    matched = None if sequence.finish_reason is None else sequence.finish_reason.matched
    if finish_reason == "stop" and isinstance(matched, str):
        return "stop_sequence", matched
    return STOP_REASONS[finish_reason], None


def encode_error(error: Exception) -> bytes:
    """What a stream ends with that fails in the middle. ASCII only: what a client sent may not be valid Unicode."""
    return b"event: error\ndata: " + json.dumps(error_body_of(error)).encode() + b"\n\n"
