"""Owns who may call what, and when: bearer keys, web pages, the readiness of the instance. Plain ASGI."""

import hmac
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ramet.srt.entrypoints.http.http_errors import error_response
from ramet.srt.utils.http_origin import OriginCheck
from ramet.srt.utils.key_proof import is_proof

HEALTH_PATHS = frozenset({"/health", "/health_generate", "/ping", "/ready"})
OPEN_PATHS = HEALTH_PATHS | {"/docs"}  # answered to everybody, at any time
NO_KEY = "the Authorization header must be 'Bearer' and a valid key, or the X-Api-Key header one"
ADMIN_PATHS = frozenset(
    {
        "/become",
        "/flush_cache",
        "/reset_prefix_cache",
        "/start_profile",
        "/stop_profile",
        "/load_lora_adapter",
        "/unload_lora_adapter",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/pause_generation",
        "/continue_generation",
        "/pause",
        "/resume",
        "/is_paused",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/update_weight_version",
        "/update_weights_from_disk",
        "/update_weights_from_instance",
        "/update_weights_delta",
        "/rollback_weights",
        "/begin_weight_update",
        "/end_weight_update",
        "/init_weights_update_group",
        "/update_weights_from_distributed",
        "/destroy_weights_update_group",
        "/update_weights_from_ipc",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/update_weights_from_tensor",
        "/weight_versions",
        "/get_weights_by_name",
        "/weights_checker",
        "/prefix_cache_hottest",
        "/prefix_cache_pages",
    }
)


# What instances ask each other for their weights.
WEIGHT_PATHS = (
    "/remote_instance_",
    "/get_remote_instance_",
    "/init_weights_send_group_for_remote_instance",
    "/send_weights_to_remote_instance",
)


# What they ask each other for of the prefix cache, whose content is what users have written.
PREFIX_PATHS = "/prefix_cache_"


class AccessMiddleware:
    """Lets a request through to the app, or answers it with 401, 403 or 503.

    Args:
        api_key: needed for every path but OPEN_PATHS; None: nothing is needed.
        admin_api_key: needed for ADMIN_PATHS, and good for all others; None: `api_key` takes its place.
        origins: tells web pages from other callers, where no key does.
        refusal: says why nothing can be answered now, or None.
        authorities: host:port by which other instances reach this one: a proof of the key that is made for one of
            them is as good as the key where weights are asked for (utils/key_proof.py).
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        admin_api_key: str | None,
        origins: OriginCheck,
        refusal: Callable[[], str | None],
        authorities: Collection[str] = (),
    ):
        self._authorities = authorities
        self._app = app
        self._api_key = api_key
        self._admin_api_key = admin_api_key
        self._origins = origins
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
        elif (answer := self._refuse(scope)) is not None:
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refuse(self, scope: Scope) -> ASGIApp | None:
        """The answer to a request that goes no further. Notes in `scope` whether an administrator asks."""
        headers = Headers(scope=scope)
        scope["is_admin"] = self._is_admin(headers)
        may_call = self._may_call(scope["path"], headers, scope["is_admin"])
        if not may_call and not self._has_proof(scope, headers):
            is_known = self._api_key is not None and has_key(headers, self._api_key)
            return error_response(
                401,
                f"{scope['path']} needs the admin key (--admin-api-key)" if is_known else NO_KEY,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._is_open(scope["path"]):
            foreign = self._origins.refusal(headers.get("host"), headers.get("origin"), headers.get("sec-fetch-site"))
            if foreign is not None:
                return error_response(403, foreign)
        refusal = self._refusal()
        return None if refusal is None else error_response(503, refusal)

    def _is_admin(self, headers: Headers) -> bool:
        """Whether the call has the strongest key there is; without any keys everybody has."""
        key = self._admin_api_key or self._api_key
        return key is None or has_key(headers, key)

    def _is_open(self, path: str) -> bool:
        """Whether the path needs no key."""
        return self._api_key is None and (self._admin_api_key is None or path not in ADMIN_PATHS)

    def _has_proof(self, scope: Scope, headers: Headers) -> bool:
        """Whether another instance asks for weights, or as an administrator for more, and has the key unshown."""
        keys = [self._api_key, self._admin_api_key]
        if scope["path"].startswith(PREFIX_PATHS):
            keys = [self._admin_api_key or self._api_key]
        elif not scope["path"].startswith(WEIGHT_PATHS):
            return False
        query = scope["query_string"].decode("latin-1")
        target = scope["path"] + (f"?{query}" if query else "")
        authorization = headers.get("authorization", "")
        return any(
            is_proof(authorization, key, scope["method"], self._authorities, target) for key in keys if key is not None
        )

    def _may_call(self, path: str, headers: Headers, is_admin: bool) -> bool:
        if is_admin:
            return True
        if path in ADMIN_PATHS:
            return False
        return self._api_key is None or has_key(headers, self._api_key)


def has_key(headers: Headers, key: str) -> bool:
    """Whether the request carries `Authorization: Bearer <key>`, or, as Anthropic's clients do it, `X-Api-Key: <key>`.

    Takes the same time for every wrong key.
    """
    scheme, _, given = headers.get("authorization", "").partition(" ")
    is_bearer = scheme.lower() == "bearer" and _is_same(given, key)
    return _is_same(headers.get("x-api-key", ""), key) or is_bearer


def _is_same(given: str, key: str) -> bool:
    return hmac.compare_digest(given.strip().encode(), key.encode())
