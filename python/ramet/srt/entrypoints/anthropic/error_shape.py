"""Owns how errors of Anthropic's routes look: in the shape of its API, wherever in the server they come from.

Plain ASGI, in front of all that answers.
"""

import json
import uuid
from typing import Any, Literal

from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ramet.srt.entrypoints.anthropic.conversion import NO_THREADS
from ramet.srt.entrypoints.http.http_errors import body_of
from ramet.srt.errors import RequestError, ServiceError

PATH = "/v1/messages"
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ErrorDetails(BaseModel):
    """What clients do something about by themselves."""

    error_code: str
    unsupported: list[str]


class ErrorWords(BaseModel):
    """What went wrong."""

    type: str
    message: str
    details: ErrorDetails | None = None


class AnthropicError(BaseModel):
    """The body of every answer that is not a success."""

    type: Literal["error"]
    error: ErrorWords
    request_id: str


def is_anthropic(path: str) -> bool:
    """Whether a path is one of Anthropic's API alone."""
    return path == PATH or path.startswith(f"{PATH}/")


def error_body(status_code: int, message: str) -> dict[str, Any]:
    """An error in Anthropic's shape."""
    default = "invalid_request_error" if status_code < 500 else "api_error"
    return {"type": "error", "error": {"type": ERROR_TYPES.get(status_code, default), "message": message}}


def error_body_of(error: Exception) -> dict[str, Any]:
    """The error in Anthropic's shape, for a stream that has already begun."""
    status_code = error.status_code if isinstance(error, RequestError | ServiceError) else 500
    return error_body(status_code, str(body_of(error)["error"]["message"]))


class AnthropicErrors:
    """Gives the answers of Anthropic's paths its name of a request's id, and errors its shape; others pass."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_anthropic(scope["path"]):
            send = _Answer(send).send
        await self._app(scope, receive, send)


class _Answer:
    """One answer on its way."""

    def __init__(self, send: Send):
        self._send = send
        self._request_id = ""
        self._start: Message | None = None  # of an error, until its body is there
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            known = dict(headers).get(b"x-request-id")
            self._request_id = known.decode("latin-1") if known else f"req_{uuid.uuid4().hex}"
            message = {**message, "headers": [*headers, (b"request-id", self._request_id.encode("latin-1"))]}
            if message["status"] >= 400:
                self._start = message
                return
        elif self._start is not None:
            self._body += message.get("body", b"")
            if message.get("more_body", False):
                return
            body = self._converted(self._start["status"])
            headers = [(name, value) for name, value in self._start["headers"] if name != b"content-length"]
            await self._send({**self._start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            message = {"type": "http.response.body", "body": body, "more_body": False}
        await self._send(message)

    def _converted(self, status_code: int) -> bytes:
        detail = json.loads(self._body)["error"]  # as all other routes have it
        body = error_body(status_code, detail["message"]) | {"request_id": self._request_id}
        if detail["code"] == NO_THREADS:
            body["error"]["details"] = {"error_code": NO_THREADS, "unsupported": [detail["param"]]}
        return json.dumps(body).encode()
