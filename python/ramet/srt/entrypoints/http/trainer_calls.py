"""Owns noticing calls that announce a trainer's broadcast and never reach their route. Plain ASGI.

The trainer may have sent all the same, and what it has sent must not be taken for what the next call announces.
"""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

IS_COUNTED = "ramet.broadcast_is_counted"  # in the scope of a call that its route has counted
SGLANGS, VLLMS = "/update_weights_from_distributed", "/update_weights"


class TrainerCalls:
    """Counts each POST to the two routes that the route itself has not counted: its body can't be read, or used.

    Args:
        count_lost: told whether it was vLLM's route.
    """

    def __init__(self, app: ASGIApp, count_lost: Callable[[bool], None]):
        self._app = app
        self._count_lost = count_lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in (SGLANGS, VLLMS) or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if not scope.get(IS_COUNTED):
                self._count_lost(scope["path"] == VLLMS)
