"""Owns the answers of grpc.health.v1: whether the server as a whole, or its P2P service, is serving."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from ramet.srt.modelexpress.proto import health_pb2, p2p_pb2

SERVICES = ("", p2p_pb2.DESCRIPTOR.services_by_name["P2pService"].full_name)
MAX_WATCHING = 256


class HealthService:
    """SERVING until told otherwise. Probes need no token."""

    def __init__(self) -> None:
        self._serving = True
        self._num_watching = 0
        self._changed = asyncio.Event()

    def stop_serving(self) -> None:
        """Answer NOT_SERVING from now on, also to those who watch."""
        self._serving = False
        self._changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        if request.service not in SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=self._status())

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> AsyncIterator[Any]:
        if self._num_watching >= MAX_WATCHING:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHING} watch already")
        self._num_watching += 1
        try:
            async for answer in self._watch(request):
                yield answer
        finally:
            self._num_watching -= 1

    async def _watch(self, request: health_pb2.HealthCheckRequest) -> AsyncIterator[Any]:
        if request.service in SERVICES:
            if self._serving:
                yield health_pb2.HealthCheckResponse(status=self._status())
                await self._changed.wait()
            yield health_pb2.HealthCheckResponse(status=self._status())
        else:
            yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        await asyncio.Event().wait()  # nothing changes after this; the stream ends with the call

    def _status(self) -> int:
        answer = health_pb2.HealthCheckResponse
        return answer.SERVING if self._serving else answer.NOT_SERVING
