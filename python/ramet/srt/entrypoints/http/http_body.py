"""Owns the reading of request bodies: how large one may be, how large all are together, and the check of large ones.

Reading and counting go piece by piece, so no body keeps the event loop from its other work. A body of many values is
first parsed in a process of its own (body_check.py): only what has passed there is parsed here again.
"""

from collections.abc import Callable
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ramet.srt.entrypoints.http.body_check import BodyChecker
from ramet.srt.entrypoints.http.http_errors import error_response
from ramet.srt.errors import RequestError, ServiceError

MAX_BODY_BYTES = 64 << 20
MAX_SMALL_BODY_BYTES = 1 << 20  # of routes that take a few fields, and at most FREE_VALUES values
MAX_ALL_BODIES_BYTES = 256 << 20  # of all requests that are being read or answered
UNCOUNTED_BYTES = 64 << 10  # of each body: the usual request finds room when others have taken all
MAX_VALUES = 2 << 20  # in one body; a few less than the commas and brackets that it may have
FREE_VALUES = 2000  # what so many values can be is parsed here at once
FREE_BYTES = 1 << 20
NUM_BODY_BYTES = "num_body_bytes"  # in the scope of a request: how long its body is

POOLING_PATHS = frozenset({"/encode", "/v1/embeddings", "/v1/score", "/v1/rerank", "/v2/rerank", "/rerank"})
GENERATE_PATHS = frozenset(
    {
        "/generate",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/responses/input_tokens",
        "/v1/messages",
        "/v1/messages/count_tokens",
    }
    | POOLING_PATHS
)
TOKENIZE_PATHS = frozenset({"/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"})
CHECKED_PATHS = GENERATE_PATHS | TOKENIZE_PATHS
MAX_BYTES = dict.fromkeys(CHECKED_PATHS, MAX_BODY_BYTES) | {
    "/remote_instance_weight_checksums": 2 << 20,
    "/init_weights_send_group_for_remote_instance": 8 << 20,
    "/update_weights_from_tensor": MAX_BODY_BYTES,
}


class _Body(NamedTuple):
    pieces: list[bytes]
    num_bytes: int
    num_values: int  # at most


class BodyMiddleware:
    """Reads a request's body before the app runs, or answers 400, 408, 413, 415 or 503.

    Args:
        checker: looks at the bodies of CHECKED_PATHS that are large.
        max_req_len: longest prompt plus output in tokens, as the checker must know it.
    """

    def __init__(self, app: ASGIApp, checker: BodyChecker, max_req_len: Callable[[], int]):
        self._app = app
        self._checker = checker
        self._max_req_len = max_req_len
        self._num_held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Reading(self, scope["path"], receive)
        try:
            body = await request.read(Headers(scope=scope))
            if body is not None:
                scope[NUM_BODY_BYTES] = body.num_bytes
                if body.num_bytes:
                    _check_type(Headers(scope=scope).get("content-type"))
                await self._check(scope["path"], body)
                await self._app(scope, _replay(body, receive), send)
        except _Refused as refused:
            await refused.answer(scope, receive, send)
        finally:
            self._num_held_bytes -= request.num_held_bytes

    async def _check(self, path: str, body: _Body) -> None:
        if path in CHECKED_PATHS and (body.num_values > FREE_VALUES or body.num_bytes > FREE_BYTES):
            try:
                await self._checker.check(path, body.pieces, self._max_req_len())
            except RequestError as error:
                raise _Refused(
                    error_response(error.status_code, str(error), param=error.param, code=error.code)
                ) from None
            except ServiceError as error:
                raise _Refused(error_response(error.status_code, str(error))) from None

    def hold(self, num_bytes: int) -> None:
        """Count bytes as held until the request is answered. Raises _Refused if all together are too many."""
        if self._num_held_bytes + num_bytes > MAX_ALL_BODIES_BYTES:
            raise _Refused(
                error_response(503, "the bodies of all requests take too much memory now", headers={"Retry-After": "1"})
            )
        self._num_held_bytes += num_bytes


class _Refused(Exception):
    """The request ends here, with an answer."""

    def __init__(self, answer: ASGIApp):
        super().__init__()
        self.answer = answer


def _check_type(content_type: str | None) -> None:
    """Raises _Refused for a body that is not said to be JSON: a page of another site can send such ones unasked."""
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        given = "it is missing" if content_type is None else f"not {content_type!r:.100}"
        raise _Refused(error_response(415, f"the Content-Type header must be application/json: {given}"))


class _Reading:
    """One body while it is read."""

    def __init__(self, bodies: BodyMiddleware, path: str, receive: Receive):
        self.num_held_bytes = 0
        self._bodies = bodies
        self._receive = receive
        self._max_bytes = MAX_BYTES.get(path, MAX_SMALL_BODY_BYTES)
        self._max_values = MAX_VALUES if path in MAX_BYTES else FREE_VALUES

    async def read(self, headers: Headers) -> _Body | None:
        """The whole body; None if the client has gone. Raises _Refused."""
        encoding = headers.get("content-encoding", "identity")
        if encoding.lower() not in ("identity", ""):
            raise _Refused(error_response(415, "the body must not be compressed (Content-Encoding)"))
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self._max_bytes:
            raise self._too_large()
        pieces: list[bytes] = []
        num_bytes = num_values = 0
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                return None
            piece = message.get("body", b"")
            if piece:
                num_bytes += len(piece)
                num_values += len(piece) - len(piece.translate(None, b",[{"))
                self._check_size(num_bytes, num_values)
                pieces.append(piece)
            if not message.get("more_body", False):
                return _Body(pieces, num_bytes, num_values)

    def _check_size(self, num_bytes: int, num_values: int) -> None:
        if num_bytes > self._max_bytes:
            raise self._too_large()
        if num_values > self._max_values:
            status_code = 413 if self._max_values == MAX_VALUES else 400
            raise _Refused(error_response(status_code, f"the body has more than {self._max_values} values"))
        wanted = max(0, num_bytes - UNCOUNTED_BYTES)
        if wanted > self.num_held_bytes:
            self._bodies.hold(wanted - self.num_held_bytes)
            self.num_held_bytes = wanted

    def _too_large(self) -> _Refused:
        return _Refused(error_response(413, f"the body is longer than {self._max_bytes} bytes"))


def _replay(body: _Body, receive: Receive) -> Receive:
    """What gives the app the body again, and after that what comes of the connection."""
    left = list(reversed(body.pieces)) or [b""]
    body.pieces.clear()  # the app has them from now on

    async def replay() -> Message:
        if left:
            piece = left.pop()
            return {"type": "http.request", "body": piece, "more_body": bool(left)}
        return await receive()

    return replay
