"""Owns how instances and operators reach what fleets shall be: by gRPC with JSON as messages, and by HTTP."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ramet.srt.modelexpress.ages import wall_clock_ms
from ramet.srt.modelexpress.rpc import FLEET_SERVICE
from ramet.srt.modelexpress.server.fleet_targets import FleetTargets
from ramet.srt.modelexpress.server.intake import Intake, Parse, json_handler
from ramet.srt.modelexpress.server.pools import Pools
from ramet.srt.modelexpress.tokens import TokenFile
from ramet.srt.utils.http_origin import OriginCheck
from ramet.srt.weights.fleet import FleetReport, SetTarget, read_report, read_set_target
from ramet.srt.weights.pool import SetScale, StandbyReport, read_set_scale, read_standby_report

TARGETS_PATH, SCALE_PATH = "/fleet/targets", "/fleet/scale"
MAX_BODY_BYTES = 64 << 10

Answer = Callable[[Request], Awaitable[Response]]


class FleetService:
    """The targets of all models and the pool of standbys, by the clocks of this process."""

    def __init__(self) -> None:
        self._targets = FleetTargets(time.monotonic())
        self._pools = Pools(self._targets.instances, wall_clock_ms())

    def describe(self, model: str) -> str:
        """The target of a model in a few words; "" if there is none."""
        return self._targets.describe(model)

    def handler(self, intake: Intake) -> grpc.GenericRpcHandler:
        """Answers `Report`, `SetTarget` and `Targets`, and for standbys `ReportStandby`, `SetScale` and `Pool`."""
        methods: dict[str, tuple[Parse, Callable[[Any], bytes]]] = {
            "Report": (read_report, self._report),
            "SetTarget": (read_set_target, self._set),
            "Targets": (bytes, lambda _: self._states()),
            "ReportStandby": (read_standby_report, self._report_standby),
            "SetScale": (read_set_scale, self._scale),
            "Pool": (bytes, lambda _: self._pool()),
        }
        return json_handler(FLEET_SERVICE, methods, intake)

    def routes(self, host: str, tokens: TokenFile | None) -> list[Route]:
        """GET and POST of the same for operators.

        Args:
            host: that the server listens on: where no token is needed, pages of other sites are refused.
        """
        origins = OriginCheck(host)

        def refusal(request: Request) -> Response | None:
            if tokens is not None:
                if tokens.accepts(request.headers.get("authorization", "")):
                    return None
                headers = {"WWW-Authenticate": "Bearer"}
                return JSONResponse({"detail": "a valid bearer token is required"}, 401, headers=headers)
            known = request.headers
            foreign = origins.refusal(known.get("host"), known.get("origin"), known.get("sec-fetch-site"))
            return None if foreign is None else JSONResponse({"detail": foreign}, 403)

        def show(make: Callable[[], bytes]) -> Answer:
            async def answer(request: Request) -> Response:
                return refusal(request) or _json(make())

            return answer

        def take(read: Callable[[bytes], Any], do: Callable[[Any], bytes]) -> Answer:
            async def answer(request: Request) -> Response:
                if (refused := refusal(request)) is not None:
                    return refused
                body = bytearray()
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > MAX_BODY_BYTES:
                        return JSONResponse({"detail": f"a body has at most {MAX_BODY_BYTES} bytes"}, 413)
                try:
                    return _json(do(read(bytes(body))))
                except ValueError as error:
                    return JSONResponse({"detail": str(error)}, 400)

            return answer

        return [
            Route(TARGETS_PATH, show(self._states)),
            Route(TARGETS_PATH, take(read_set_target, self._set), methods=["POST"]),
            Route(SCALE_PATH, show(self._pool)),
            Route(SCALE_PATH, take(read_set_scale, self._scale), methods=["POST"]),
        ]

    def _report(self, report: FleetReport) -> bytes:
        return msgspec.json.encode(self._targets.report(report, time.monotonic()))

    def _set(self, wanted: SetTarget) -> bytes:
        return msgspec.json.encode(self._targets.set(wanted, time.monotonic(), wall_clock_ms()))

    def _report_standby(self, report: StandbyReport) -> bytes:
        return msgspec.json.encode(self._pools.report(report, time.monotonic()))

    def _scale(self, wanted: SetScale) -> bytes:
        return msgspec.json.encode(self._pools.scale(wanted, time.monotonic()))

    def _pool(self) -> bytes:
        return msgspec.json.encode(self._pools.state(time.monotonic()))

    def _states(self) -> bytes:
        return msgspec.json.encode(self._targets.states())


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json", headers={"Cache-Control": "no-store"})
