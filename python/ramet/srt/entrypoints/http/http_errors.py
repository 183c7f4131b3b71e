"""Owns how errors look on the wire: OpenAI's shape, for every route and every kind of failure."""

import json
import typing

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ramet.srt.entrypoints.http.accepted_fields import Table
from ramet.srt.entrypoints.http.validation_words import NO_FIELDS, describe_unreadable, describe_validation_errors
from ramet.srt.errors import RequestError, ServiceError

MAX_MESSAGE_CHARS = 2000
MAX_PARAM_CHARS = 200
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


def error_body(
    status_code: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """An error in OpenAI's shape."""
    if len(message) > MAX_MESSAGE_CHARS:  # it quotes what the client knows
        message = message[: MAX_MESSAGE_CHARS // 2] + " … " + message[-MAX_MESSAGE_CHARS // 2 :]
    if param is not None:
        param = param[:MAX_PARAM_CHARS]
    default = "invalid_request_error" if status_code < 500 else "server_error"
    kind = ERROR_TYPES.get(status_code, default)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status_code: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """An answer in OpenAI's error shape. ASCII only: what a client sent may not be valid Unicode."""
    body = json.dumps(error_body(status_code, message, param=param, code=code))
    return Response(body, status_code, headers, media_type="application/json")


def response_to(error: RequestError | ServiceError) -> Response:
    """The answer to a request that ended with `error`."""
    if isinstance(error, RequestError):
        return error_response(error.status_code, str(error), param=error.param, code=error.code)
    return error_response(error.status_code, str(error))


def body_of(error: Exception) -> dict[str, dict[str, str | None]]:
    """The error in OpenAI's shape, for a stream that has already begun."""
    if isinstance(error, RequestError):
        return error_body(error.status_code, str(error), param=error.param, code=error.code)
    if isinstance(error, ServiceError):
        return error_body(error.status_code, str(error))
    return error_body(500, "internal error")


async def on_unexpected(_request: Request, _error: Exception) -> Response:
    """The answer where something in here is wrong."""
    return error_response(500, "internal error")


def _foreign_fields(request: Request) -> Table:
    """The fields of other servers that are known in the body of the request's route."""
    table: Table = getattr(typing.get_type_hints(request.scope["endpoint"]).get("body"), "foreign", NO_FIELDS)
    return table


def install_error_handlers(app: FastAPI) -> None:
    """Make every failure of `app` an answer in OpenAI's error shape."""

    @app.exception_handler(RequestError)
    async def on_request_error(_request: Request, error: RequestError) -> Response:
        return response_to(error)

    @app.exception_handler(ServiceError)
    async def on_service_error(_request: Request, error: ServiceError) -> Response:
        return response_to(error)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
        # FastAPI says first in which part of the request something is: the body, the query or the path.
        errors = [{**one, "loc": one["loc"][1:]} for one in error.errors()]
        message, param, code = describe_validation_errors(errors, error.body, _foreign_fields(request))
        return error_response(400, message, param=param, code=code)

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        message, path = str(error.detail), request.scope["path"]
        if error.status_code == 400 and error.__cause__ is not None:  # FastAPI could not parse the body
            message = describe_unreadable(error.__cause__)
        elif error.status_code == 404:
            message = f"there is no route {path}: /docs lists those that there are"
        elif error.status_code == 405:
            message = f"{path} takes {headers.get('Allow', 'another method')}, not {request.method}"
        return error_response(error.status_code, message, headers=headers)

    app.add_exception_handler(Exception, on_unexpected)
