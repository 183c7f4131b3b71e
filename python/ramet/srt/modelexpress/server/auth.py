"""Owns who may call the server: with a token file, every gRPC call but health checks needs a token from it."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from ramet.srt.modelexpress.proto import health_pb2
from ramet.srt.modelexpress.server.server_metrics import ServerMetrics
from ramet.srt.modelexpress.tokens import TokenFile

OPEN_PREFIX = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/"


async def refuse(_messages: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a valid bearer token is required")


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED to calls without a valid token, before their message is read."""

    def __init__(self, tokens: TokenFile, metrics: ServerMetrics):
        self._tokens = tokens
        self._metrics = metrics
        self._refusal = grpc.stream_unary_rpc_method_handler(refuse)  # it waits for no message

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        if handler_call_details.method.startswith(OPEN_PREFIX):
            return await continuation(handler_call_details)
        for key, value in handler_call_details.invocation_metadata:
            if key == "authorization" and self._tokens.accepts(value):
                return await continuation(handler_call_details)
        self._metrics.unauthenticated.inc()
        return self._refusal
