"""Owns what the OpenAPI page says of the answers that are no success, and of streams."""

from typing import Any

from ramet.srt.entrypoints.http.http_errors import ErrorResponse

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
