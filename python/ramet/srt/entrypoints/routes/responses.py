"""Owns the routes of OpenAI's Responses API."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from ramet.srt.entrypoints.http.error_descriptions import ERRORS, EVENTS, NOT_FOUND
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.openai.response_store import ResponseStore
from ramet.srt.entrypoints.openai.responses_answers import DeletedResponse, InputItems, InputTokens, ResponseObject
from ramet.srt.entrypoints.openai.responses_protocol import InputTokensRequest, ResponsesRequest
from ramet.srt.entrypoints.openai.serving_chat import ChatServing
from ramet.srt.entrypoints.openai.serving_responses import DEFAULT_LISTED, MAX_LISTED, ResponsesServing
from ramet.srt.errors import RequestError

PREFIX = "/v1/responses"


def make_responses_router(instance: Instance) -> APIRouter:
    """Create, retrieve, list what was asked, delete."""
    router = APIRouter(tags=["openai"], responses=ERRORS | NOT_FOUND)
    store = ResponseStore()

    def serving() -> ResponsesServing:
        chat = ChatServing(instance.manager, instance.server_args.model_name)
        return ResponsesServing(chat, store)

    @router.post(PREFIX, responses={200: {"model": ResponseObject, "content": EVENTS}})
    async def create(body: ResponsesRequest, request: Request) -> Response:
        """Answer an input, or go on from an earlier response."""
        return await serving().create(body, request)

    @router.post(f"{PREFIX}/input_tokens", responses={200: {"model": InputTokens}})
    async def input_tokens(body: InputTokensRequest, request: Request) -> Response:
        """How many tokens a response's prompt would have."""
        return await serving().count_tokens(body, request)

    @router.get(f"{PREFIX}/{{response_id}}", responses={200: {"model": ResponseObject}})
    async def retrieve(response_id: str, stream: bool = False) -> Response:
        """A response that is remembered."""
        if stream:
            raise RequestError("stream: the events of a response are not kept, only the response", param="stream")
        return serving().retrieve(response_id)

    @router.delete(f"{PREFIX}/{{response_id}}", responses={200: {"model": DeletedResponse}})
    async def delete(response_id: str) -> Response:
        """Forget a response."""
        return serving().delete(response_id)

    @router.get(f"{PREFIX}/{{response_id}}/input_items", responses={200: {"model": InputItems}})
    async def input_items(
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = DEFAULT_LISTED,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        """What a response has answered, the conversation before it included."""
        return serving().input_items(response_id, limit=limit, is_ascending=order == "asc", after=after)

    @router.post(f"{PREFIX}/{{response_id}}/cancel")
    async def cancel(response_id: str) -> Response:
        """Always refused: only what runs in the background could be cancelled, and nothing does."""
        raise RequestError(
            f"the response {response_id!r} does not run in the background, so it can't be cancelled: close its "
            "connection instead",
            param="response_id",
        )

    return router
