"""Owns the HTTP routes of an instance and their OpenAPI description; when the server lives is http_server.py's."""

import asyncio
import contextlib
import os
import re
import time
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query, Request
from pydantic import ConfigDict, Field
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

import ramet
from ramet.srt.batch.batch_plan import Pooling
from ramet.srt.entrypoints.anthropic.error_shape import AnthropicErrors
from ramet.srt.entrypoints.anthropic_routes import make_anthropic_router
from ramet.srt.entrypoints.generate_request import GenerateReqInput, answer_request, stream_request
from ramet.srt.entrypoints.http.answers import (
    ChatCompletion,
    Completion,
    Done,
    Loads,
    ModelCard,
    ModelInfo,
    ModelList,
    NativeOutput,
    ReplicaLoad,
    Status,
    Version,
)
from ramet.srt.entrypoints.http.body_check import BodyChecker
from ramet.srt.entrypoints.http.direct_routes import DirectRoutes, find_endpoints
from ramet.srt.entrypoints.http.docs_page import docs_response
from ramet.srt.entrypoints.http.event_stream import (
    ClientGone,
    client_gone_response,
    event_stream,
    json_response,
    until_disconnect,
)
from ramet.srt.entrypoints.http.http_access import OPEN_PATHS, AccessMiddleware
from ramet.srt.entrypoints.http.http_body import GENERATE_PATHS, BodyMiddleware
from ramet.srt.entrypoints.http.http_errors import ErrorResponse, error_response, install_error_handlers, on_unexpected
from ramet.srt.entrypoints.http.http_front import FrontMiddleware
from ramet.srt.entrypoints.http.http_validation import RequestBody
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.load_answers import all_loads, replica_loads
from ramet.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from ramet.srt.entrypoints.openai.serving_base import check_model, unknown_model
from ramet.srt.entrypoints.openai.serving_chat import ChatServing
from ramet.srt.entrypoints.openai.serving_completions import CompletionServing
from ramet.srt.entrypoints.pooling_routes import make_pooling_router
from ramet.srt.entrypoints.responses_routes import make_responses_router
from ramet.srt.entrypoints.tokenize_routes import make_tokenize_router
from ramet.srt.entrypoints.weight_routes import make_weight_router
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.io_struct import FlushCacheReqOutput, ProfileReqOutput
from ramet.srt.managers.metrics import CONTENT_TYPE
from ramet.srt.managers.prepare_requests import SequenceInput
from ramet.srt.sampling.sampling_params import SamplingParams
from ramet.srt.utils.http_origin import OriginCheck

HEALTH_TIMEOUT_S = 20.0
METRICS_TIMEOUT_S = 2.0
EVENTS: dict[str, Any] = {"text/event-stream": {}}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "Something in the request is wrong; `param` names it."},
    401: {"model": ErrorResponse, "description": "The key is missing or wrong."},
    403: {"model": ErrorResponse, "description": "A web page asks, and no key is set."},
    408: {"model": ErrorResponse, "description": "The request has not come in time."},
    413: {"model": ErrorResponse, "description": "The body is too long."},
    415: {"model": ErrorResponse, "description": "The body is compressed, or no JSON by its Content-Type."},
    500: {"model": ErrorResponse, "description": "The instance has failed."},
    503: {"model": ErrorResponse, "description": "The instance is loading, full or stopping."},
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorResponse, "description": "There is no such thing."}}
BAD_HEALTH: dict[int | str, dict[str, Any]] = {503: ERRORS[503]}


EXACTLY_ONE_TARGET: dict[str, Any] = {
    "oneOf": [
        {"required": ["rid"], "properties": {"rid": {"type": "string"}, "abort_all": {"enum": [False, None]}}},
        {"required": ["abort_all"], "properties": {"rid": {"type": "null"}, "abort_all": {"const": True}}},
    ]
}


class AbortBody(RequestBody):
    """Which request to end: one by its id, or all of them."""

    model_config = ConfigDict(json_schema_extra=EXACTLY_ONE_TARGET)

    rid: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    abort_all: bool | None = False


class StartProfileBody(RequestBody):
    """What the ranks record, and where they write it."""

    output_dir: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    num_steps: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    activities: Annotated[list[Literal["CPU", "GPU"]], Field(min_length=1)] | None = None
    with_stack: bool | None = None
    record_shapes: bool | None = None


class DescribedApp(FastAPI):
    """An application whose OpenAPI description is true: bad input is answered with 400, never 422; keys are named."""

    has_keys = False
    front: ASGIApp | None = None  # what requests meet before all that is FastAPI's

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.front or self.answer)(scope, receive, send)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what has passed the front."""
        await super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        schema = self.openapi_schema
        if schema is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a route with two methods has one operation id, until below
                schema = super().openapi()
            self._correct(schema)
        return schema

    def _correct(self, schema: dict[str, Any]) -> None:
        schema["components"]["schemas"].pop("HTTPValidationError", None)
        schema["components"]["schemas"].pop("ValidationError", None)
        if self.has_keys:
            schema["components"]["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            }
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                operation["operationId"] = f"{method}_{re.sub('[^a-z0-9]+', '_', path).strip('_')}"
                operation["responses"].pop("422", None)
                if self.has_keys and path not in OPEN_PATHS:
                    operation["security"] = [{"key": []}, {"x-api-key": []}]


def create_app(instance: Instance, checker: BodyChecker | None = None) -> FastAPI:
    """The application that serves `instance`; `checker`, which users' requests need, sees large bodies first."""
    args = instance.server_args
    app = DescribedApp(title="Ramet", version=ramet.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.has_keys = bool(args.api_key or args.admin_api_key)
    install_error_handlers(app)

    @app.exception_handler(ClientGone)
    async def on_client_gone(_request: Request, _error: ClientGone) -> Response:
        return client_gone_response()

    routes = (
        (_health_routes, _native_routes, _admin_routes, _openai_routes, _responses_routes)
        if instance.is_head
        else (_node_routes,)
    )
    routers = [make_router(instance) for make_router in routes]
    if instance.is_head:
        routers.append(make_anthropic_router(instance, ERRORS | NOT_FOUND))
        routers.append(make_pooling_router(instance, ERRORS | NOT_FOUND))
    for router in routers:
        app.include_router(router)
    if instance.is_head:
        app.include_router(make_weight_router(instance, ERRORS | NOT_FOUND))
        app.include_router(make_tokenize_router(instance, ERRORS | NOT_FOUND))
    app.front = _front_of(app, instance, checker, [route for router in routers for route in router.routes])
    return app


def _front_of(app: DescribedApp, instance: Instance, checker: BodyChecker | None, routes: Sequence[Any]) -> ASGIApp:
    """What a request meets before the application: who may ask, its body, and the short way of users' requests."""
    args = instance.server_args
    origins = OriginCheck(args.host, args.allowed_host_names)
    front: ASGIApp = app.answer
    if instance.is_head:
        front = DirectRoutes(front, find_endpoints(routes, GENERATE_PATHS))
    if checker is not None:
        front = BodyMiddleware(front, checker, lambda: instance.manager.limits.max_req_len)
    front = AccessMiddleware(
        front,
        api_key=args.api_key,
        admin_api_key=args.admin_api_key,
        origins=origins,
        refusal=instance.refusal,
        authorities=args.authorities,
    )
    return AnthropicErrors(FrontMiddleware(ServerErrorMiddleware(front, handler=on_unexpected), origins))


def _node_routes(instance: Instance) -> APIRouter:
    """All that a node other than 0 answers: users are served by node 0."""
    router = APIRouter(tags=["health"], responses=BAD_HEALTH)

    @router.get("/health", response_model=Status)
    async def health() -> Response:
        """Whether this node's ranks are running."""
        refusal = instance.refusal() or instance.doubt
        if refusal is not None:
            raise ServiceError(refusal)
        return json_response({"status": "ready"})

    return router


def _health_routes(instance: Instance) -> APIRouter:
    router = APIRouter(tags=["health"], responses=BAD_HEALTH)

    def check() -> None:
        refusal = instance.refusal() or instance.manager.refusal or instance.doubt
        if refusal is not None:
            raise ServiceError(refusal)

    @router.get("/health", responses={200: {"model": Status}})
    @router.get("/ready", responses={200: {"model": Status}})
    @router.api_route("/ping", methods=["GET", "POST"], responses={200: {"model": Status}})
    async def health() -> Response:
        """Whether the instance takes requests, and its processes move."""
        check()
        return json_response({"status": "ready"})

    probe = HealthProbe(instance)

    @router.get("/health_generate", responses={200: {"model": Status}})
    async def health_generate(request: Request) -> Response:
        """Whether the instance really computes: makes one token or embedding, for all who ask meanwhile."""
        check()
        await until_disconnect(request, probe.wait())
        return json_response({"status": "ready"})

    return router


class HealthProbe:
    """Makes a token, or an embedding where the model makes those, for whoever asks.

    One at a time: no key is needed, so the queue must not fill with these.
    """

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._task: asyncio.Task[None] | None = None

    async def wait(self) -> None:
        """Until a token is there, perhaps of a generation that is under way. Raises ServiceError if none comes."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._generate())
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # who asked may have left
        await asyncio.shield(self._task)

    async def _generate(self) -> None:
        params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        pooling = Pooling() if self._instance.manager.limits.embedding is not None else None
        prompt = SequenceInput(input_ids=[0], sampling_params=params, pooling=pooling)
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                generation = await self._instance.manager.generate([prompt])
                await generation.finish()
        except TimeoutError:
            raise ServiceError(f"no token was made within {HEALTH_TIMEOUT_S:g} s") from None


def _native_routes(instance: Instance) -> APIRouter:
    router = APIRouter(tags=["native"], responses=ERRORS)

    @router.post("/generate", responses={200: {"model": NativeOutput | list[NativeOutput], "content": EVENTS}})
    async def generate(body: GenerateReqInput, request: Request) -> Response:
        """Continue one or several prompts. Streams with `stream`: the text of each event is all text so far."""
        check_model(body.model, instance.server_args.model_name)
        if body.stream:
            return await event_stream(request, stream_request(instance.manager, body))

        async def answer() -> Response:
            return json_response(await answer_request(instance.manager, body))

        return await until_disconnect(request, answer())

    @router.get("/model_info", responses={200: {"model": ModelInfo}})
    @router.get("/get_model_info", responses={200: {"model": ModelInfo}}, deprecated=True)
    async def model_info() -> Response:
        """What is served."""
        return json_response(instance.model_info())

    @router.get("/server_info")
    @router.get("/get_server_info", deprecated=True)
    async def server_info() -> Response:
        """Configuration, limits, how the weights came, start-up phases and the scheduler's numbers."""
        return json_response(instance.server_info(await instance.manager.internal_states()))

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
        info = instance.transfer_engine_info(role, rank)
        if info is None:
            raise RequestError(f"rank {rank} of {role!r} has not registered its weights", param="rank", status_code=404)
        return Response(info, media_type="application/json")

    return router


def _admin_routes(instance: Instance) -> APIRouter:
    router = APIRouter(tags=["administration"], responses=ERRORS)

    def done_or_refused(reply: FlushCacheReqOutput | ProfileReqOutput) -> Response:
        if not reply.success:
            return error_response(400, reply.message)
        return json_response({"success": True, "message": reply.message})

    @router.api_route("/flush_cache", methods=["GET", "POST"], responses={200: {"model": Done}})
    async def flush_cache() -> Response:
        """Drop the prefix cache; refused while requests run."""
        return done_or_refused(await instance.manager.flush_cache())

    @router.post("/start_profile", responses={200: {"model": Done}})
    async def start_profile(body: StartProfileBody | None = None) -> Response:
        """Have every rank record `num_steps` passes, or all until /stop_profile, and write a Chrome trace."""
        body = body or StartProfileBody()
        reply = await instance.manager.start_profile(
            root=instance.server_args.profile_root,
            output_dir=_profile_folder(instance, body.output_dir),
            num_steps=body.num_steps,
            activities=list(body.activities or ("CPU", "GPU")),
            with_stack=bool(body.with_stack),
            record_shapes=bool(body.record_shapes),
        )
        return done_or_refused(reply)

    @router.post("/stop_profile", responses={200: {"model": Done}})
    async def stop_profile() -> Response:
        """End the recording; answered when it is written."""
        return done_or_refused(await instance.manager.stop_profile())

    @router.post("/abort_request", responses={200: {"model": Done}})
    async def abort_request(body: AbortBody, request: Request) -> Response:
        """End a request by its id, or all of them. Succeeds for an unknown id too: it may just have ended."""
        if bool(body.abort_all) == (body.rid is not None):
            raise RequestError("exactly one of rid and abort_all must be given", param="rid")
        if body.abort_all and not request.scope["is_admin"]:
            return error_response(401, "abort_all needs the admin key", code="invalid_api_key")
        number = instance.manager.abort_all() if body.rid is None else instance.manager.abort(body.rid)
        return json_response({"success": True, "message": f"{number} sequences are being aborted"})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        with contextlib.suppress(ServiceError):  # the scheduler is in a long pass: its last numbers are shown
            instance.metrics.observe_states(await instance.manager.internal_states(METRICS_TIMEOUT_S))
        return Response(instance.metrics.render(), media_type=CONTENT_TYPE)

    return router


def _profile_folder(instance: Instance, wanted: str | None) -> str:
    """Where a caller's profile goes: the ranks see to it that it is below the folder that the operator has set."""
    root = instance.server_args.profile_root
    if wanted is not None and not instance.server_args.names_profile_folder:
        raise RequestError(
            "output_dir: callers may choose a folder only below that of --profile-dir, which is not set",
            param="output_dir",
        )
    return os.path.join(root, wanted or "")


def _responses_routes(instance: Instance) -> APIRouter:
    return make_responses_router(instance, ERRORS | NOT_FOUND)


def _openai_routes(instance: Instance) -> APIRouter:
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

    def model_card() -> dict[str, Any]:
        return {
            "id": instance.server_args.model_name,
            "object": "model",
            "created": started,
            "owned_by": "ramet",
            "root": instance.server_args.model_path,
            "max_model_len": instance.manager.limits.max_req_len,
        }

    @router.get("/models", responses={200: {"model": ModelList}})
    async def models() -> Response:
        """The models that can be named: one."""
        return json_response({"object": "list", "data": [model_card()]})

    @router.get("/models/{model:path}", responses={200: {"model": ModelCard}})
    async def model(model: str) -> Response:
        """One model."""
        if model != instance.server_args.model_name:
            raise unknown_model(model, instance.server_args.model_name)
        return json_response(model_card())

    return router
