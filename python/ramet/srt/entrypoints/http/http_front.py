"""Owns what every request has before its path is looked at: an id, HEAD, trailing slashes, a proxy's prefix, and pages.

Plain ASGI, in front of all else.
"""

import re
import uuid

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ramet.srt.entrypoints.http.http_access import ADMIN_PATHS
from ramet.srt.entrypoints.http.logged_text import MAX_METHOD_CHARS, cut, logged_target
from ramet.srt.observability.request_record import RequestRecord, begin_request
from ramet.srt.utils.http_origin import OriginCheck

REQUEST_ID = re.compile(rb"[!-~]{1,128}")
PREFLIGHT_AGE_S = 600
METHODS = ("GET", "POST", "DELETE", "HEAD")


class FrontMiddleware:
    """Makes HEAD a GET whose body the server drops, `/path/` a `/path`, and takes the root path off.

    Every answer has an `X-Request-Id`: the request's own, or else a new one. Whatever is done for the request knows it.

    Args:
        root_path: of the server behind its proxy; "" without one.
    """

    def __init__(self, app: ASGIApp, root_path: str = ""):
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        is_given = REQUEST_ID.fullmatch(request_id) is not None
        if not is_given:
            request_id = uuid.uuid4().hex.encode()
        method = cut(scope["method"], MAX_METHOD_CHARS)
        record = RequestRecord(request_id.decode("ascii"), method, target_of(scope), is_given)
        begin_request(record)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"x-request-id", request_id)]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(self._without_habits(scope), receive, send_with_id)

    def _without_habits(self, scope: Scope) -> Scope:
        """The request as routes know it. A HEAD must not do what a GET of an administrator's does."""
        path = without_root(scope["path"], self._root_path)
        if len(path) > 1 and path.endswith("/"):
            path = path.rstrip("/") or "/"
        if path != scope["path"] or self._root_path:
            scope = {**scope, "path": path, "root_path": self._root_path}
        if scope["method"] == "HEAD" and path not in ADMIN_PATHS:
            scope = {**scope, "method": "GET"}  # uvicorn, which has the request's own scope, sends no body
        return scope


def target_of(scope: Scope) -> str:
    """The path as it came, with the names in its query."""
    return logged_target(scope["path"], scope["query_string"].decode("latin-1"))


def without_root(path: str, root_path: str) -> str:
    """A path below the root path; as it is where the proxy has taken that off already."""
    if root_path and (path == root_path or path.startswith(f"{root_path}/")):
        return path[len(root_path) :] or "/"
    return path


class PageMiddleware:
    """Answers preflights, and lets pages read answers: those of sites that the operator has named, and no others.

    Args:
        origins: knows the sites.
    """

    def __init__(self, app: ASGIApp, origins: OriginCheck):
        self._app = app
        self._origins = origins
        self._for_pages = CORSMiddleware(
            app,
            allow_origin_regex=".*",  # of the others, none gets here
            allow_methods=METHODS,
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
            max_age=PREFLIGHT_AGE_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = next((value for name, value in scope.get("headers", ()) if name == b"origin"), None)
        may_read = origin is not None and self._origins.may_read(origin.decode("latin-1"))
        await (self._for_pages if may_read else self._app)(scope, receive, send)
