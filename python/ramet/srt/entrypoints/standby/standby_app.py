"""Owns a standby's own routes, and which application a request comes to: the standby's, or that of what serves."""

import dataclasses
from typing import Any, Literal

from fastapi import APIRouter
from prometheus_client import generate_latest
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

import ramet
from ramet.srt.entrypoints.http.answers import Answer, Status
from ramet.srt.entrypoints.http.body_check import BodyChecker
from ramet.srt.entrypoints.http.error_descriptions import ERRORS
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.http.http_access import OPEN_PATHS, AccessMiddleware
from ramet.srt.entrypoints.http.http_body import BodyMiddleware
from ramet.srt.entrypoints.http.http_counts import HttpCounts
from ramet.srt.entrypoints.http.http_errors import error_response, install_error_handlers, on_unexpected
from ramet.srt.entrypoints.http.http_front import FrontMiddleware, PageMiddleware, without_root
from ramet.srt.entrypoints.http.request_log import LogConfig, RequestLogMiddleware
from ramet.srt.entrypoints.http_api import DescribedApp
from ramet.srt.entrypoints.instance_info import SECRET_FIELDS
from ramet.srt.entrypoints.standby.orders import BecomeBody
from ramet.srt.entrypoints.standby.standby import Became, Standby
from ramet.srt.entrypoints.standby.standby_metrics import own_registry
from ramet.srt.errors import ServiceError
from ramet.srt.managers.metrics import CONTENT_TYPE
from ramet.srt.utils.http_origin import OriginCheck

OWN_PATHS = frozenset({"/become", "/standby"})  # also while a model serves


class StandbyState(Answer):
    """A standby, also while a model serves."""

    state: Literal["standby", "becoming", "serving"]
    served_model_name: str | None
    is_warm: bool  # processes wait for a model that it has not had
    warm_after_s: float | None  # from the launch until they did so first
    kept: list[str]  # models that it has put down and keeps; the last one last


class BecomeOutcome(Answer):
    """What an instance has become, and in which time: `phases_ms` is from the request to the end of each phase."""

    state: Literal["standby", "serving"]
    served_model_name: str | None
    was: str | None
    way: Literal["new", "kept", "same"]
    source: str
    num_bytes: int
    weight_version: str | None
    milliseconds: float
    phases_ms: dict[str, float]


def make_standby_router(standby: Standby) -> APIRouter:
    """What a standby answers while it has no model, and `/become`."""
    router = APIRouter(responses=ERRORS)
    registry = own_registry(standby.metrics)

    @router.post("/become", tags=["standby"], responses={200: {"model": BecomeOutcome}})
    async def become(body: BecomeBody) -> Response:
        """Serve another model, or none with null in place of its path; answered when a first token could be made."""
        return json_response(become_answer(standby, await standby.become(body)))

    @router.get("/standby", tags=["standby"], responses={200: {"model": StandbyState}})
    async def state() -> Response:
        """What it is now, and what it could become soonest."""
        return json_response(standby_info(standby))

    @router.get("/health", tags=["health"], responses={200: {"model": Status}})
    @router.api_route("/ping", methods=["GET", "POST"], tags=["health"], responses={200: {"model": Status}})
    async def health() -> Response:
        """Whether it is up; `status` says what it is at."""
        return json_response({"status": standby.state if standby.warm_after_s is not None else "warming"})

    @router.get("/ready", tags=["health"], responses={200: {"model": Status}})
    @router.get("/health_generate", tags=["health"], responses={200: {"model": Status}})
    async def ready() -> Response:
        """Never: users' requests are answered by a model."""
        raise ServiceError(standby.refusal or "this instance changes")

    @router.get("/server_info", tags=["native"])
    @router.get("/get_server_info", tags=["native"])
    async def server_info() -> Response:
        """How it was started, and what it keeps."""
        args = dataclasses.asdict(standby.template)
        shown = {name: value for name, value in args.items() if name not in SECRET_FIELDS}
        shown |= {"model_path": None, "served_model_name": None, "version": ramet.__version__}
        return json_response({**shown, "state": standby.state, "standby": standby_info(standby)})

    @router.get("/v1/models", tags=["OpenAI"])
    async def models() -> Response:
        """None."""
        return json_response({"object": "list", "data": []})

    @router.get("/metrics", tags=["administration"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE)

    return router


def standby_info(standby: Standby) -> dict[str, Any]:
    """What is shown of a standby beside what it serves."""
    serving = standby.serving
    return {
        "state": standby.state,
        "served_model_name": None if serving is None else serving.args.model_name,
        "is_warm": standby.spares.is_warm,
        "warm_after_s": None if standby.warm_after_s is None else round(standby.warm_after_s, 3),
        "kept": [life.args.model_name for life in standby.kept.values()],
    }


def become_answer(standby: Standby, became: Became) -> dict[str, Any]:
    """What has come of a change, as it is answered."""
    return {
        "state": standby.state,
        "served_model_name": became.model,
        "was": became.was,
        "way": became.way,
        "source": became.weights.source,
        "num_bytes": became.weights.num_bytes,
        "weight_version": became.version,
        "milliseconds": round(1000 * became.phases["ready"], 1),
        "phases_ms": {name: round(1000 * seconds, 1) for name, seconds in became.phases.items()},
    }


class StandbyApp:
    """The application that a standby's server has: it hands requests on to what serves."""

    def __init__(self, standby: Standby):
        self._standby = standby
        self._root_path = standby.template.root_path
        self.own = _own_app(standby)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        life = self._standby.serving
        if life is None or scope["type"] != "http" or self._is_own(scope["path"]):
            await self.own(scope, receive, send)
        else:
            await life.app(scope, receive, send)

    def _is_own(self, path: str) -> bool:
        return without_root(path, self._root_path).rstrip("/") in OWN_PATHS


def _own_app(standby: Standby) -> DescribedApp:
    args = standby.template
    app = DescribedApp(
        title="Ramet, on standby", version=ramet.__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.has_keys = bool(args.api_key or args.admin_api_key)
    install_error_handlers(app)
    router = make_standby_router(standby)
    app.include_router(router)
    paths = {route.path for route in router.routes}  # type: ignore[attr-defined]  # all are routes with a path
    origins = OriginCheck(args.host, args.allowed_host_names, args.cors_allow_origins)
    # No body of a path that it has is looked at by a process of its own.
    front: ASGIApp = BodyMiddleware(app.answer, BodyChecker(0), lambda: 0)
    front = _NoModel(front, standby, paths | OPEN_PATHS | {str(app.openapi_url)})
    front = AccessMiddleware(
        front,
        api_key=args.api_key,
        admin_api_key=args.admin_api_key,
        origins=origins,
        refusal=lambda: None,
        authorities=args.authorities,
    )
    front = PageMiddleware(ServerErrorMiddleware(front, handler=on_unexpected), origins)
    log_config = LogConfig(args.log_requests, args.log_requests_level)
    front = log = RequestLogMiddleware(front, HttpCounts(args.model_name), sorted(paths), log_config, None)
    app.flush_log = log.flush
    app.front = FrontMiddleware(front, args.root_path)
    return app


class _NoModel:
    """Answers what needs a model with 503."""

    def __init__(self, app: ASGIApp, standby: Standby, paths: set[str]):
        self._app, self._standby, self._paths = app, standby, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._paths:
            refusal = self._standby.refusal or "this instance has just changed: ask again"
            await error_response(503, refusal, headers={"Retry-After": "1"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)
