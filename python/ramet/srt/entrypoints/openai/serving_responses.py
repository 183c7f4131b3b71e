"""Owns the Responses routes: an input and what came before it to a chat, its outputs to a response, and the memory."""

import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ramet.srt.entrypoints.http.event_stream import encode_named_event, event_stream, json_response, until_disconnect
from ramet.srt.entrypoints.http.http_body import NUM_BODY_BYTES
from ramet.srt.entrypoints.http.http_errors import body_of
from ramet.srt.entrypoints.openai.chat_run import ChatRun, ChoiceUpdate
from ramet.srt.entrypoints.openai.response_store import MAX_RESPONSE_BYTES, ResponseStore, StoredItem, StoredResponse
from ramet.srt.entrypoints.openai.responses_chat import chat_body, response_names
from ramet.srt.entrypoints.openai.responses_events import ResponseEvents
from ramet.srt.entrypoints.openai.responses_items import JsonItem, complete_item, new_id, user_message
from ramet.srt.entrypoints.openai.responses_protocol import InputTokensRequest, ItemReference, ResponsesRequest
from ramet.srt.entrypoints.openai.serving_chat import ChatServing, PreparedChat
from ramet.srt.errors import RequestError

Events = list[dict[str, Any]]
DEFAULT_LISTED = 20
MAX_LISTED = 100


@dataclass
class _Conversation:
    """What a response answers."""

    history: Sequence[StoredItem]  # of the responses before
    items: list[JsonItem] = field(default_factory=list)  # what is asked now
    num_stored_bytes: int = 0  # of what the memory gave
    own_ids: set[str] = field(default_factory=set)  # of those items whose ids were made here

    def all_items(self) -> list[JsonItem]:
        """From the beginning."""
        return [*(item.decode() for item in self.history), *self.items]


@dataclass
class _Turn:
    """A response while it is made."""

    body: ResponsesRequest
    conversation: _Conversation
    chat: PreparedChat
    events: ResponseEvents | None = None  # once it is certain that there will be some


class ResponsesServing:
    """The Responses routes of one instance."""

    def __init__(self, chat: ChatServing, store: ResponseStore):
        self._chat = chat
        self._store = store

    async def create(self, body: ResponsesRequest, request: Request) -> Response:
        """Answer `body`.

        Raises:
            RequestError: if it can't be served.
            ServiceError: if the instance can't serve it.
            ClientGone: if the client goes away first.
        """
        turn = _Turn(body, *await self._prepare(body, request))
        if not body.stream:
            return await until_disconnect(request, self._answer(turn))

        def encode_error(error: Exception) -> bytes:
            assert turn.events is not None
            message = body_of(error)["error"]["message"]
            return _encode(turn.events.fail_with(error, message or ""))

        return await event_stream(request, self._events(turn), encode=_encode, encode_error=encode_error, last=b"")

    async def count_tokens(self, body: InputTokensRequest, request: Request) -> Response:
        """How many tokens the prompt has. Raises what `create` raises."""
        _, chat = await self._prepare(body, request)
        with response_names():
            num_tokens = await self._chat.count_tokens(chat, request)
        return json_response({"object": "response.input_tokens", "input_tokens": num_tokens})

    # ---- what there is to answer ----

    async def _prepare(self, body: InputTokensRequest, request: Request) -> tuple[_Conversation, PreparedChat]:
        conversation = self._conversation(body)
        # Long chats are rendered apart, and of this one the body may be the smallest part.
        request.scope[NUM_BODY_BYTES] = request.scope.get(NUM_BODY_BYTES, 0) + conversation.num_stored_bytes
        with response_names():
            chat = await self._chat.prepare(chat_body(body, conversation.all_items()), request)
        return conversation, chat

    def _conversation(self, body: InputTokensRequest) -> _Conversation:
        """What came before, and what is asked now. Raises RequestError for what is not remembered."""
        history: Sequence[StoredItem] = ()
        if body.previous_response_id:
            stored = self._store.get(body.previous_response_id)
            if stored is None:
                raise RequestError(
                    f"previous_response_id: there is no response {body.previous_response_id!r} (any more)",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            history = stored.items
        conversation = _Conversation(history, num_stored_bytes=sum(item.num_bytes for item in history))
        if isinstance(body.input, str):
            conversation.items.append(user_message(body.input))
            conversation.own_ids.add(conversation.items[0]["id"])
            return conversation
        for given in body.input or ():
            if isinstance(given, ItemReference):
                item = self._store.get_item(given.id)
                if item is None:
                    raise RequestError(f"input: there is no item {given.id!r} (any more)", param="input")
                conversation.num_stored_bytes += item.num_bytes
                if conversation.num_stored_bytes > MAX_RESPONSE_BYTES:  # one item may be named many times
                    raise RequestError(
                        f"input: the items that it refers to have more than {MAX_RESPONSE_BYTES} bytes", param="input"
                    )
                conversation.items.append(item.decode())
                continue
            conversation.items.append(complete_item(given))
            if not given.id:
                conversation.own_ids.add(conversation.items[-1]["id"])
        return conversation

    # ---- the answer ----

    async def _answer(self, turn: _Turn) -> Response:
        async with aclosing(self._events(turn)) as events:
            async for _ in events:
                pass
        assert turn.events is not None
        return json_response(turn.events.response)

    async def _events(self, turn: _Turn) -> AsyncGenerator[Events, None]:
        """The events of the stream, those together that come together; the first when there is some output."""
        body = turn.body
        with response_names():
            run = await self._chat.open(turn.chat)
        with response_names():
            async with aclosing(run.updates()) as updates:
                async for update in updates:
                    told: Events = []
                    if turn.events is None:
                        head = _head(body, run, self._chat.model_name)
                        turn.events = ResponseEvents(head, encodes_reasoning=body.wants_encoded_reasoning)
                        told += turn.events.begin()
                    told += turn.events.add(update.events, self._logprobs(run, update))
                    if update.finish_reason is not None:
                        turn.events.response["metadata"] = _metadata(body, run)
                        told += turn.events.end(update.finish_reason, _usage(run), int(time.time()))
                        self._remember(turn, turn.events.response)
                    yield told

    def _logprobs(self, run: ChatRun, update: ChoiceUpdate) -> list[dict[str, Any]]:
        logprobs = self._chat.logprobs(run.body, run.sequences[0], update.first_token, update.end_token)
        return [] if logprobs is None else logprobs["content"]

    # ---- the memory ----

    def _remember(self, turn: _Turn, response: dict[str, Any]) -> None:
        if turn.body.store is not False and response["status"] != "failed":
            conversation = turn.conversation
            self._store.add(response, conversation.history, conversation.items, frozenset(conversation.own_ids))

    def retrieve(self, response_id: str) -> Response:
        """The response as it was answered. Raises RequestError if it is not remembered."""
        return Response(self._stored(response_id).data, media_type="application/json")

    def delete(self, response_id: str) -> Response:
        """Forget it. Raises RequestError if it is not remembered."""
        if not self._store.delete(response_id):
            raise _no_response(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    def input_items(self, response_id: str, *, limit: int, is_ascending: bool, after: str | None) -> Response:
        """What it answered, the conversation before it included, in pages.

        Args:
            after: the id of the item behind which the page begins.

        Raises:
            RequestError: if the response is not remembered, or has no such item.
        """
        items = list(self._stored(response_id).input)
        if not is_ascending:
            items.reverse()
        if after is not None:
            place = next((place for place, item in enumerate(items) if item.id == after), None)
            if place is None:
                raise RequestError(f"after: there is no item {after!r}", param="after")
            items = items[place + 1 :]
        page = items[:limit]
        listed = {
            "object": "list",
            "data": [item.decode() for item in page],
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": len(items) > limit,
        }
        return json_response(listed)

    def _stored(self, response_id: str) -> StoredResponse:
        stored = self._store.get(response_id)
        if stored is None:
            raise _no_response(response_id)
        return stored


def _no_response(response_id: str) -> RequestError:
    return RequestError(f"there is no response {response_id!r} (any more)", param="response_id", status_code=404)


def _encode(events: Events) -> bytes:
    return b"".join(encode_named_event(event) for event in events)


def _head(body: ResponsesRequest, run: ChatRun, model_name: str) -> dict[str, Any]:
    """What a response says of what was asked, with the values that were used."""
    params = run.sequences[0].request.sampling_params
    text: dict[str, Any] = {"format": {"type": "text"}}
    if body.text is not None:
        text |= body.text.model_dump(exclude_none=True, by_alias=True)
    choice: Any = body.tool_choice or "auto"
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "model": model_name,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": _metadata(body, run),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id or None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": text,
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _metadata(body: ResponsesRequest, run: ChatRun) -> dict[str, str]:
    """The client's, and which weights have answered. Values are texts, as the API has it."""
    sequence = run.sequences[0]
    metadata = {**(body.metadata or {}), "weight_version": sequence.weight_version}
    if len(sequence.weight_versions) > 1:
        metadata["weight_versions"] = json.dumps(sequence.weight_versions)
    return metadata


def _usage(run: ChatRun) -> dict[str, Any]:
    sequence = run.sequences[0]
    num_input, num_output = sequence.prompt_tokens, len(sequence.output_ids)
    return {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": sequence.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": run.num_reasoning_tokens(0)},
        "total_tokens": num_input + num_output,
    }
