"""Owns the server's HTTP side: the fleet page, the same as JSON, the metrics and a health check."""

from collections.abc import Sequence
from pathlib import Path

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

PAGE = Path(__file__).with_name("fleet.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make_fleet_app(
    fleet: Fleet, metrics: ServerMetrics, tokens: TokenFile | None, more: Sequence[Route] = ()
) -> Starlette:
    """The HTTP application. With `tokens`, the fleet's data needs one of them; the page asks for it.

    Args:
        more: further routes.
    """
    page = PAGE.read_bytes()

    async def show_page(_request: Request) -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    async def show_fleet(request: Request) -> Response:
        if tokens is not None and not tokens.accepts(request.headers.get("authorization", "")):
            return PlainTextResponse(
                "a valid bearer token is required\n", status_code=401, headers={"WWW-Authenticate": "Bearer"}
            )
        try:
            snapshot = await fleet.snapshot()
        except StoreError as error:
            return PlainTextResponse(f"{error}\n", status_code=503)
        return Response(
            msgspec.json.encode(snapshot), media_type="application/json", headers={"Cache-Control": "no-store"}
        )

    async def show_metrics(_request: Request) -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def show_health(_request: Request) -> Response:
        return PlainTextResponse("OK\n")

    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/fleet.json", show_fleet),
            Route("/metrics", show_metrics),
            Route("/health", show_health),
            *more,
        ]
    )
