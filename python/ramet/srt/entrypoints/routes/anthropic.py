"""Owns Anthropic's routes of an instance and their description."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from ramet.srt.entrypoints.anthropic.answers import MessageAnswer, TokenCount
from ramet.srt.entrypoints.anthropic.error_shape import AnthropicError
from ramet.srt.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest
from ramet.srt.entrypoints.anthropic.serving_messages import MessagesServing
from ramet.srt.entrypoints.http.error_descriptions import ERRORS, EVENTS, NOT_FOUND
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.openai.serving_chat import ChatServing


def make_anthropic_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    responses = {status: {**error, "model": AnthropicError} for status, error in (ERRORS | NOT_FOUND).items()}
    router = APIRouter(tags=["anthropic"], prefix="/v1/messages", responses=responses)

    def serving() -> MessagesServing:
        chat = ChatServing(instance.manager, instance.server_args.model_name)
        return MessagesServing(chat)

    @router.post("", responses={200: {"model": MessageAnswer, "content": EVENTS}})
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, in the shape of Anthropic's API."""
        return await serving().create(body, request)

    @router.post("/count_tokens", responses={200: {"model": TokenCount}})
    async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
        """How many tokens the prompt of a conversation has."""
        return await serving().count_tokens(body, request)

    return router
