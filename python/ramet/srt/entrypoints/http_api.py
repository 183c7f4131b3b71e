"""Owns an instance's routes as one application with its OpenAPI description; when it is served is http_server.py's."""

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import ramet
from ramet.srt.entrypoints.anthropic.error_shape import AnthropicErrors
from ramet.srt.entrypoints.http.body_check import BodyChecker
from ramet.srt.entrypoints.http.direct_routes import DirectRoutes, find_endpoints
from ramet.srt.entrypoints.http.event_stream import ClientGone, client_gone_response
from ramet.srt.entrypoints.http.http_access import OPEN_PATHS, AccessMiddleware
from ramet.srt.entrypoints.http.http_body import GENERATE_PATHS, BodyMiddleware
from ramet.srt.entrypoints.http.http_errors import install_error_handlers, on_unexpected
from ramet.srt.entrypoints.http.http_front import FrontMiddleware, PageMiddleware
from ramet.srt.entrypoints.http.request_log import LogConfig, RequestLogMiddleware, Trace
from ramet.srt.entrypoints.http.trainer_calls import TrainerCalls
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.routes.admin import make_admin_router
from ramet.srt.entrypoints.routes.anthropic import make_anthropic_router
from ramet.srt.entrypoints.routes.health import make_health_router, make_node_router
from ramet.srt.entrypoints.routes.lora import make_lora_router
from ramet.srt.entrypoints.routes.native import make_native_router
from ramet.srt.entrypoints.routes.openai import make_openai_router
from ramet.srt.entrypoints.routes.pauses import make_pause_router
from ramet.srt.entrypoints.routes.pooling import make_pooling_router
from ramet.srt.entrypoints.routes.prefixes import make_prefix_router
from ramet.srt.entrypoints.routes.responses import make_responses_router
from ramet.srt.entrypoints.routes.sleep import make_sleep_router
from ramet.srt.entrypoints.routes.tokenize import make_tokenize_router
from ramet.srt.entrypoints.routes.trainer_groups import make_trainer_group_router, make_transfer_router
from ramet.srt.entrypoints.routes.weight_inspection import make_inspection_router
from ramet.srt.entrypoints.routes.weight_sessions import make_weight_session_router
from ramet.srt.entrypoints.routes.weight_updates import make_weight_update_router
from ramet.srt.entrypoints.routes.weight_versions import make_version_router
from ramet.srt.entrypoints.routes.weights import make_weight_router
from ramet.srt.entrypoints.traces import trace_request
from ramet.srt.observability.traces import tracer
from ramet.srt.utils.http_origin import OriginCheck

# Of the head's. In their order they stand on the page that describes them.
ROUTERS = (
    make_health_router,
    make_native_router,
    make_admin_router,
    make_version_router,
    make_pause_router,
    make_sleep_router,
    make_lora_router,
    make_weight_update_router,
    make_inspection_router,
    make_weight_session_router,
    make_trainer_group_router,
    make_transfer_router,
    make_openai_router,
    make_responses_router,
    make_anthropic_router,
    make_pooling_router,
    make_weight_router,
    make_prefix_router,
    make_tokenize_router,
)


class DescribedApp(FastAPI):
    """An application whose OpenAPI description is true: bad input is answered with 400, never 422; keys are named."""

    has_keys = False
    flush_log: Callable[[], None]  # writes the lines about requests that wait to be written together
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


def create_app(instance: Instance, checker: BodyChecker | None = None) -> DescribedApp:
    """The application that serves `instance`; `checker`, which users' requests need, sees large bodies first."""
    args = instance.server_args
    app = DescribedApp(
        title="Ramet",
        version=ramet.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.has_keys = bool(args.api_key or args.admin_api_key)
    install_error_handlers(app)

    @app.exception_handler(ClientGone)
    async def on_client_gone(_request: Request, _error: ClientGone) -> Response:
        return client_gone_response()

    routers = [make_router(instance) for make_router in (ROUTERS if instance.is_head else (make_node_router,))]
    for router in routers:
        app.include_router(router)
    app.front = _front_of(app, instance, checker, [route for router in routers for route in router.routes])
    return app


def _trace() -> Trace | None:
    """What puts requests into traces, where there are some."""
    own = tracer()
    return None if own is None else Trace(own.begin, functools.partial(trace_request, own))


def _front_of(app: DescribedApp, instance: Instance, checker: BodyChecker | None, routes: Sequence[Any]) -> ASGIApp:
    """What a request meets before the application: who may ask, its body, and the short way of users' requests."""
    args = instance.server_args
    origins = OriginCheck(args.host, args.allowed_host_names, args.cors_allow_origins)
    front: ASGIApp = app.answer
    if instance.is_head:
        front = DirectRoutes(front, find_endpoints(routes, GENERATE_PATHS))
    if checker is not None:
        front = BodyMiddleware(front, checker, lambda: instance.manager.limits.max_req_len)
    if instance.is_head:
        front = TrainerCalls(front, lambda by_vllms: instance.trainer_groups.count_lost_call(is_stateless=by_vllms))
    front = AccessMiddleware(
        front,
        api_key=args.api_key,
        admin_api_key=args.admin_api_key,
        origins=origins,
        refusal=instance.refusal,
        authorities=args.authorities,
    )
    front = PageMiddleware(ServerErrorMiddleware(front, handler=on_unexpected), origins)
    paths = [str(app.openapi_url), *(route.path for route in routes)]
    log_config = LogConfig(args.log_requests, args.log_requests_level)
    front = log = RequestLogMiddleware(front, instance.http_counts, paths, log_config, _trace())
    app.flush_log = log.flush
    return AnthropicErrors(FrontMiddleware(front, args.root_path))
