"""Owns OpenAI's routes of an instance but for the Responses API: completions, chats, models."""

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ramet.srt.entrypoints.http.answers import ChatCompletion, Completion, ModelCard, ModelList
from ramet.srt.entrypoints.http.error_descriptions import ERRORS, EVENTS, NOT_FOUND
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from ramet.srt.entrypoints.openai.serving_chat import ChatServing
from ramet.srt.entrypoints.openai.serving_completions import CompletionServing


def make_openai_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["openai"], prefix="/v1", responses=ERRORS | NOT_FOUND)
    started = int(time.time())

    @router.post("/completions", responses={200: {"model": Completion, "content": EVENTS}})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        serving = CompletionServing(instance.manager, instance.server_args.model_name)
        return await serving.create(body, request)

    @router.post("/chat/completions", responses={200: {"model": ChatCompletion, "content": EVENTS}})
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await ChatServing(instance.manager, instance.server_args.model_name).create(body, request)

    def model_cards() -> list[dict[str, Any]]:
        served = instance.server_args.model_name
        adapters = instance.manager.adapters.usable()
        path = instance.server_args.model_path
        ids: list[tuple[str, str, dict[str, str]]] = [(name, path, {}) for name in instance.server_args.model_names]
        ids += [(one.adapter.name, one.path, {"parent": served}) for one in adapters]
        return [
            {
                "id": name,
                "object": "model",
                "created": started,
                "owned_by": "ramet",
                "root": path,
                "max_model_len": instance.manager.limits.max_req_len,
                **more,
            }
            for name, path, more in ids
        ]

    @router.get("/models", responses={200: {"model": ModelList}})
    async def models() -> Response:
        """The models that can be named: the one that is served, and adapters of it."""
        return json_response({"object": "list", "data": model_cards()})

    @router.get("/models/{model:path}", responses={200: {"model": ModelCard}})
    async def model(model: str) -> Response:
        """One model."""
        names = instance.server_args.model_names
        name = instance.manager.adapters.name_of(model, names[0]) or (model if model in names else names[0])
        return json_response(next(card for card in model_cards() if card["id"] == name))

    return router
