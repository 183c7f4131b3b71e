"""Owns the HTTP routes with which a clone asks for the cached prefixes of the instance that it has its weights from."""

import functools

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from ramet.srt.entrypoints.http.error_descriptions import ERRORS, NOT_FOUND
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.prefix_cloning import own_content
from ramet.srt.entrypoints.routes.weights import Turns
from ramet.srt.errors import RequestError
from ramet.srt.managers.prefix_messages import (
    HottestAnswer,
    HottestBody,
    HottestPrefixesOutput,
    HottestPrefixesReq,
    PagesBody,
    PrefixPagesOutput,
    ReadPrefixReq,
    pack_keys,
    unpack_keys,
)
from ramet.srt.utils.outside_json import decode_json

MAX_WAITING = 16
CONFLICT = 409


def make_prefix_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["weights"], responses=ERRORS | NOT_FOUND)
    turn = Turns(MAX_WAITING)

    def check(content: str) -> None:
        if not instance.server_args.clone_prefix_cache:
            raise RequestError(
                "this instance gives no cached prefixes: it was started without --clone-prefix-cache", status_code=404
            )
        if content != own_content(instance.doors):
            raise RequestError(
                "the weights here are others, or can't be had now", param="content", status_code=CONFLICT
            )

    @router.post("/prefix_cache_hottest")
    async def prefix_cache_hottest(request: Request) -> Response:
        """Which cached prefixes are used most, for an instance that has its weights from here.

        The body is {"content": name of the weights' bytes, "max_pages"}, the answer {"layout", "version", "runs":
        [[base64 of the tokens, index of the first page], …]}.
        """
        try:
            body = decode_json(await request.body(), HottestBody)
        except ValueError as error:
            raise RequestError(f"the body can't be used: {error}") from None
        check(body.content)
        question = functools.partial(HottestPrefixesReq, max_pages=min(body.max_pages, 1 << 31))
        async with turn:
            [reply] = await instance.manager.ask_all(question, HottestPrefixesOutput)
        if reply.refusal:
            raise RequestError(reply.refusal, status_code=CONFLICT)
        runs = [(pack_keys(run.keys), run.first) for run in reply.runs]
        answer = HottestAnswer(layout=reply.layout, version=reply.version, runs=runs)
        return Response(msgspec.json.encode(answer), media_type="application/json")

    @router.post("/prefix_cache_pages")
    async def prefix_cache_pages(request: Request) -> Response:
        """Keys and values of pages of a cached prefix, as far as it is still cached.

        The body is {"content", "layout", "version", "keys": base64 of the tokens up to the last page, "first": index of
        a page, "count"}, the answer their bytes.
        """
        try:
            body = decode_json(await request.body(), PagesBody)
            keys = unpack_keys(body.keys)
        except ValueError as error:
            raise RequestError(f"the body can't be used: {error}") from None
        check(body.content)
        question = functools.partial(
            ReadPrefixReq,
            layout=body.layout,
            version=body.version,
            keys=keys,
            first=min(body.first, 1 << 31),
            count=min(body.count, 1 << 31),
        )
        async with turn:
            [reply] = await instance.manager.ask_all(question, PrefixPagesOutput)
        if reply.refusal:
            raise RequestError(reply.refusal, status_code=CONFLICT)
        return Response(reply.data, media_type="application/octet-stream")

    return router
