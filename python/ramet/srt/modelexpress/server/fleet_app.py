"""Owns the server's HTTP side: the fleet page, the same as JSON, the metrics and a health check."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ramet.srt.modelexpress.server.fleet import Fleet
from ramet.srt.modelexpress.server.server_metrics import ServerMetrics
from ramet.srt.modelexpress.server.store import StoreError
from ramet.srt.modelexpress.tokens import TokenFile

PAGE_FOLDER = Path(__file__).with_name("page")
PAGE_FILES = {
    "/": ("fleet.html", "text/html"),
    "/fleet.css": ("fleet.css", "text/css"),
    "/fleet.js": ("fleet.js", "text/javascript"),
    "/fleet_target.js": ("fleet_target.js", "text/javascript"),
    "/fleet_table.js": ("fleet_table.js", "text/javascript"),
    "/fleet_timeline.js": ("fleet_timeline.js", "text/javascript"),
    "/fleet_pool.js": ("fleet_pool.js", "text/javascript"),
    "/fleet_words.js": ("fleet_words.js", "text/javascript"),
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
JSON_HEADERS = {"Cache-Control": "no-store"}


def make_fleet_app(
    fleet: Fleet, metrics: ServerMetrics, tokens: TokenFile | None, more: Sequence[Route] = ()
) -> Starlette:
    """The HTTP application. With `tokens`, the fleet's data needs one of them; the page asks for it.

    Args:
        more: further routes.
    """

    async def show_fleet(_request: Request) -> Any:
        return await fleet.snapshot()

    async def show_loads(request: Request) -> Any:
        text = request.query_params.get("after", "0")
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise ValueError(f"after must be the num_loads of an answer; got {text[:40]!r}")
        return await fleet.loads(int(text))

    async def show_metrics(_request: Request) -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def show_health(_request: Request) -> Response:
        return PlainTextResponse("OK\n")

    return Starlette(
        routes=[
            *[Route(path, show_file(*what)) for path, what in PAGE_FILES.items()],
            Route("/fleet.json", show_json(show_fleet, tokens)),
            Route("/loads.json", show_json(show_loads, tokens)),
            Route("/metrics", show_metrics),
            Route("/health", show_health),
            *more,
        ]
    )


def show_file(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    """Answers with a file of the page."""
    content = (PAGE_FOLDER / name).read_bytes()

    async def show(_request: Request) -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return show


def show_json(
    make: Callable[[Request], Awaitable[Any]], tokens: TokenFile | None
) -> Callable[[Request], Awaitable[Response]]:
    """Answers with what `make` makes, to who has one of the tokens."""

    async def show(request: Request) -> Response:
        if tokens is not None and not tokens.accepts(request.headers.get("authorization", "")):
            return PlainTextResponse(
                "a valid bearer token is required\n", status_code=401, headers={"WWW-Authenticate": "Bearer"}
            )
        try:
            answer = await make(request)
        except StoreError as error:
            return PlainTextResponse(f"{error}\n", status_code=503)
        except ValueError as error:
            return PlainTextResponse(f"{error}\n", status_code=400)
        return Response(msgspec.json.encode(answer), media_type="application/json", headers=JSON_HEADERS)

    return show
