"""Owns SGLang's native routes of an instance, and those that say what it is."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import HTMLResponse, Response

import ramet
from ramet.srt.entrypoints import instance_info
from ramet.srt.entrypoints.generate_request import GenerateReqInput, answer_request, stream_request
from ramet.srt.entrypoints.http.answers import Loads, ModelInfo, NativeOutput, ReplicaLoad, Version
from ramet.srt.entrypoints.http.docs_page import docs_response
from ramet.srt.entrypoints.http.error_descriptions import ERRORS, EVENTS, NOT_FOUND
from ramet.srt.entrypoints.http.event_stream import event_stream, json_response, until_disconnect
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.load_answers import all_loads, replica_loads
from ramet.srt.errors import RequestError


def make_native_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["native"], responses=ERRORS)

    @router.post("/generate", responses={200: {"model": NativeOutput | list[NativeOutput], "content": EVENTS}})
    async def generate(body: GenerateReqInput, request: Request) -> Response:
        """Continue one or several prompts. Streams with `stream`: the text of each event is all text so far."""
        body.choose_model(instance.manager.adapters, instance.server_args.model_name)
        if body.stream:
            return await event_stream(request, stream_request(instance.manager, body))

        async def answer() -> Response:
            return json_response(await answer_request(instance.manager, body))

        return await until_disconnect(request, answer())

    @router.get("/model_info", responses={200: {"model": ModelInfo}})
    @router.get("/get_model_info", responses={200: {"model": ModelInfo}}, deprecated=True)
    async def model_info() -> Response:
        """What is served."""
        return json_response(instance_info.model_info(instance))

    @router.get("/server_info")
    @router.get("/get_server_info", deprecated=True)
    async def server_info(config_format: Literal["json"] | None = None) -> Response:
        """Configuration, limits, how the weights came, start-up phases and the scheduler's numbers.

        With `config_format=json` also `vllm_config`: what trainers ask vLLM's server for.
        """
        answer = instance_info.server_info(instance, await instance.manager.internal_states())
        more = {} if config_format is None else {"vllm_config": instance_info.vllm_config(instance)}
        return json_response(answer | more)

    @router.get("/get_load", responses={200: {"model": list[ReplicaLoad]}})
    async def get_load() -> Response:
        """How much each replica has to do: SGLang's older form."""
        return json_response(replica_loads(await instance.manager.internal_states()))

    @router.get("/v1/loads", responses={200: {"model": Loads}})
    async def loads() -> Response:
        """How much each replica has to do, and all together."""
        max_running_requests = instance.schedulers[0].max_running_requests
        return json_response(all_loads(await instance.manager.internal_states(), max_running_requests))

    @router.get("/version", responses={200: {"model": Version}})
    async def version() -> Response:
        """Which version of Ramet this is."""
        return json_response({"version": ramet.__version__})

    @router.get("/docs", response_class=HTMLResponse)
    async def docs() -> Response:
        """This description as a page."""
        return docs_response()

    @router.get("/remote_instance_transfer_engine_info", responses=NOT_FOUND)
    @router.get("/get_remote_instance_transfer_engine_info", responses=NOT_FOUND, deprecated=True)
    async def remote_instance_transfer_engine_info(
        rank: Annotated[int, Query(ge=0, le=2**31 - 1)], role: str = "target"
    ) -> Response:
        """Where another instance finds the weights of this instance's `rank`. WIRE: SGLang's bootstrap protocol."""
        info = instance.doors.transfer_engine_info(role, rank)
        if info is None:
            raise RequestError(instance.doors.why_absent(role, rank), param="rank", status_code=404)
        return Response(info, media_type="application/json")

    return router
