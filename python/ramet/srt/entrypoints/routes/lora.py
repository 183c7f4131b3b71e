"""Owns the routes that load and unload adapters: SGLang's, vLLM's, and what other instances ask."""

import json
from collections.abc import Coroutine
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from ramet.srt.entrypoints.http.answers import LoraOutcome
from ramet.srt.entrypoints.http.error_descriptions import ERRORS, NOT_FOUND
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.http_errors import body_of
from ramet.srt.entrypoints.http.http_validation import RequestBody, Text
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.lora.adapter import MAX_NAME_LEN
from ramet.srt.lora.adapter_paths import LIST_PATH, LoraPath

Name = Annotated[Text, Field(min_length=1, max_length=MAX_NAME_LEN)]


class LoadLoraBody(RequestBody):
    """Which adapter to load, and by which name requests shall name it."""

    lora_name: Name
    lora_path: Annotated[Text, Field(min_length=1, max_length=4096)]  # folder, hub id, or instance://HOST:PORT
    pinned: bool | None = False  # once requests have used it, it stays in its slot


class UnloadLoraBody(RequestBody):
    """Which adapter to unload."""

    lora_name: Name


def make_lora_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["administration"], responses=ERRORS | NOT_FOUND)

    async def load(body: LoadLoraBody) -> None:
        await instance.lora.load(LoraPath(body.lora_name, body.lora_path, bool(body.pinned)))

    async def outcome(work: Coroutine[Any, Any, None]) -> Response:
        """SGLang's answer; that of a failure has OpenAI's shape, too."""
        error: RequestError | ServiceError | None = None
        try:
            await work
        except (RequestError, ServiceError) as failure:
            error = failure
        loaded = {one.adapter.name: one.path for one in instance.manager.adapters.usable()}
        answer = {"success": error is None, "error_message": str(error or ""), "loaded_adapters": loaded}
        if error is None:
            return json_response(answer)
        content = json.dumps(answer | body_of(error))
        return Response(content, error.status_code, media_type="application/json")

    @router.post("/load_lora_adapter", responses={200: {"model": LoraOutcome}})
    async def load_lora_adapter(body: LoadLoraBody) -> Response:
        """Load an adapter; answered when requests can name it."""
        return await outcome(load(body))

    @router.post("/unload_lora_adapter", responses={200: {"model": LoraOutcome}})
    async def unload_lora_adapter(body: UnloadLoraBody) -> Response:
        """Unload an adapter: no new request gets it, and it is gone when those that have it have ended."""
        return await outcome(instance.lora.unload(body.lora_name))

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def v1_load_lora_adapter(body: LoadLoraBody) -> Response:
        """The same in vLLM's words."""
        await load(body)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def v1_unload_lora_adapter(body: UnloadLoraBody) -> Response:
        """The same in vLLM's words."""
        await instance.lora.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @router.get(LIST_PATH)
    async def remote_instance_lora_adapters() -> Response:
        """The adapters that this instance gives to others; see docs/wire.md."""
        if not instance.doors.gives_weights:
            raise RequestError(
                "this instance gives nothing away (--remote-instance-weight-loader-start-seed-via-transfer-engine)",
                status_code=404,
            )
        return Response(msgspec.json.encode(instance.lora.list_for_instances()), media_type="application/json")

    return router
