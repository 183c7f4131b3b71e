"""Owns what every request has before its path is looked at: an id, HEAD, trailing slashes, and what pages may read.

Plain ASGI, in front of all else.
"""

import re
import uuid

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ramet.srt.entrypoints.http.http_access import ADMIN_PATHS
from ramet.srt.utils.http_origin import OriginCheck

REQUEST_ID = re.compile(rb"[!-~]{1,128}")
PREFLIGHT_AGE_S = 600
Headers = list[tuple[bytes, bytes]]


class FrontMiddleware:
    """Answers CORS preflights; makes HEAD a GET whose body the server drops, and `/path/` a `/path`.

    Every answer has an `X-Request-Id`: the request's own, or else a new one.

    Args:
        origins: knows the sites whose pages may read answers.
    """

    def __init__(self, app: ASGIApp, origins: OriginCheck):
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = dict(scope["headers"])
        request_id = asked.get(b"x-request-id", b"")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex.encode()
        added: Headers = [(b"x-request-id", request_id)]
        if b"origin" in asked:
            added += self._cors_headers(asked[b"origin"])
        app = self._app
        if scope["method"] == "OPTIONS" and len(added) > 1 and b"access-control-request-method" in asked:
            app = Response(status_code=204)
            added += _preflight_headers(asked)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await app(_without_habits(scope), receive, send_with_headers)

    def _cors_headers(self, origin: bytes) -> Headers:
        """What lets a page read the answer, if it is of a site that the operator has named."""
        if not self._origins.may_read(origin.decode("latin-1")):
            return []
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", b"X-Request-Id"),
            (b"vary", b"Origin"),
        ]


def _preflight_headers(asked: dict[bytes, bytes]) -> Headers:
    return [
        (b"access-control-allow-methods", b"GET, POST, DELETE, HEAD"),
        (b"access-control-allow-headers", asked.get(b"access-control-request-headers", b"Content-Type, Authorization")),
        (b"access-control-max-age", str(PREFLIGHT_AGE_S).encode()),
    ]


def _without_habits(scope: Scope) -> Scope:
    """The request as routes know it. A HEAD must not do what a GET of an administrator's does."""
    path = scope["path"]
    if len(path) > 1 and path.endswith("/"):
        path = path.rstrip("/") or "/"
        scope = {**scope, "path": path}
    if scope["method"] == "HEAD" and path not in ADMIN_PATHS:
        scope = {**scope, "method": "GET"}  # uvicorn, which has the request's own scope, sends no body
    return scope
