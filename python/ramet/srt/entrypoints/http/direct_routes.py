"""Owns the short way of users' requests from their bodies to their routes. Plain ASGI.

FastAPI's own way through its layers takes some tenths of a millisecond, which a first token waits for. It is still
taken by what is unusual, and describes the routes.
"""

import json
import typing
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ramet.srt.entrypoints.http.event_stream import ClientGone, client_gone_response
from ramet.srt.entrypoints.http.http_errors import error_response, response_to
from ramet.srt.entrypoints.http.http_validation import RequestBody
from ramet.srt.entrypoints.http.validation_words import describe_unreadable, describe_validation_errors
from ramet.srt.errors import RequestError, ServiceError

JSON_TYPE = (b"content-type", b"application/json")
NO_BODY = {"type": "missing", "loc": (), "msg": "Field required"}
BODY, REQUEST = "body", "request"


class Endpoint(NamedTuple):
    """What a route does with a body, as its function in routes/ says it."""

    body_type: type[RequestBody]
    run: Callable[..., Awaitable[Response]]


def find_endpoints(routes: Iterable[Any], paths: Iterable[str]) -> Mapping[str, Endpoint]:
    """Of the routes, the POST routes of `paths` by their path. They must take `body` and `request`, and no more."""
    found = {}
    for route in routes:
        if isinstance(route, APIRoute) and route.path in paths and route.methods == {"POST"}:
            hints = typing.get_type_hints(route.endpoint)
            assert set(hints) == {BODY, REQUEST, "return"}, route.path
            found[route.path] = Endpoint(hints[BODY], route.endpoint)
    return found


class DirectRoutes:
    """Answers POST requests of the endpoints' paths with JSON bodies; the app does everything else.

    The body has been read: it comes at once.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Endpoint]):
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" else None
        if endpoint is None or scope["method"] != "POST" or JSON_TYPE not in scope["headers"]:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            data = await request.body()
        except ClientDisconnect:
            return
        response = await _answer(endpoint, request, data)
        await response(scope, receive, send)


def parse_json(data: bytes) -> Any:
    """As json.loads does it, which also takes what is no JSON, such as NaN, and is three times as slow.

    Raises:
        ValueError, RecursionError: what it raises; a JSONDecodeError for what is not JSON at all.
    """
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return json.loads(data)


async def _answer(endpoint: Endpoint, request: Request, data: bytes) -> Response:
    """The endpoint's answer, or what is wrong, in the words that FastAPI's way has for it."""
    try:
        if not data:
            return error_response(400, describe_validation_errors([NO_BODY])[0])
        content = parse_json(data)
        body = endpoint.body_type.model_validate(content, from_attributes=True)  # as FastAPI does it
    except ValidationError as error:
        message, param, code = describe_validation_errors(error.errors(), content, endpoint.body_type.foreign)
        return error_response(400, message, param=param, code=code)
    except (ValueError, RecursionError, MemoryError) as error:
        return error_response(400, describe_unreadable(error))
    try:
        return await endpoint.run(body=body, request=request)
    except (RequestError, ServiceError) as error:
        return response_to(error)
    except ClientGone:
        return client_gone_response()
