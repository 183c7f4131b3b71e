"""Owns a standby's life in a pool: it reports to a metadata server, and carries out what that orders."""

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from ramet.srt.configs.modelexpress_config import resolve_address
from ramet.srt.entrypoints.standby.orders import BecomeBody
from ramet.srt.entrypoints.standby.standby import Standby
from ramet.srt.errors import RequestError, ServiceError, one_line
from ramet.srt.utils.net import format_url, reachable_host
from ramet.srt.weights.fleet import MAX_NAME_LEN
from ramet.srt.weights.pool import MAX_KEPT, StandbyOrder, StandbyReport

if TYPE_CHECKING:
    from ramet.srt.modelexpress.client.client import ModelExpressClient

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
OLD_SERVER_PAUSE_S = 30.0  # between two questions to a server that knows nothing of standbys


class PoolMember:
    """Of one standby.

    Args:
        started_at: unix seconds.
    """

    def __init__(self, standby: Standby, started_at: float):
        self._standby = standby
        self._started_at = started_at
        self._express = standby.template.modelexpress
        args = standby.template
        self._instance = format_url(reachable_host(args.host), args.port)  # as what serves calls itself
        self._order = StandbyOrder()
        self._done_number = 0
        self._error = ""
        self._carrying: asyncio.Task[None] | None = None
        self._had_trouble = False

    async def run(self) -> None:
        """Report until cancelled."""
        client = None
        try:
            while True:
                pause_s = 1.0
                try:
                    if client is None:
                        client = await asyncio.to_thread(self._connect)
                    pause_s = await self._report(client)
                except (ValueError, OSError) as error:  # a certificate that can't be read, an answer that is none
                    self._note_trouble(one_line(error))
                await self._wait(pause_s)
        finally:
            if client is not None:
                client.close()

    def _connect(self) -> "ModelExpressClient":
        from ramet.srt.modelexpress.client.client import ModelExpressClient  # imports grpc

        assert self._express is not None
        return ModelExpressClient(resolve_address(self._express.url), timeout_s=CALL_TIMEOUT_S)

    async def _wait(self, pause_s: float) -> None:
        """Until it is time to report again, or an order has been carried out."""
        if self._carrying is None:
            await asyncio.sleep(pause_s)
            return
        await asyncio.wait([self._carrying], timeout=pause_s)
        if self._carrying.done():
            self._carrying = None

    async def _report(self, client: "ModelExpressClient") -> float:
        """Seconds until the next report."""
        from ramet.srt.modelexpress.client.client import ModelExpressError

        try:
            answer = await asyncio.to_thread(client.call_fleet, "ReportStandby", msgspec.json.encode(self._state()))
        except ModelExpressError as error:
            if error.code == "UNIMPLEMENTED":
                return OLD_SERVER_PAUSE_S
            self._note_trouble(str(error))
            return 1.0
        self._had_trouble = False
        order = msgspec.json.decode(answer, type=StandbyOrder)
        if order.number not in (0, self._done_number) and self._carrying is None:
            self._carrying = asyncio.create_task(self._carry_out(order))
        return order.pause_s

    def _state(self) -> StandbyReport:
        standby = self._standby
        life = standby.serving
        return StandbyReport(
            instance=self._instance,
            started_at=self._started_at,
            state=standby.state if standby.warm_after_s is not None else "warming",
            model="" if life is None else life.args.weights_name[:MAX_NAME_LEN],
            recipe="" if life is None else life.recipe,
            is_warm=standby.spares.is_warm,
            kept=[one.args.weights_name[:MAX_NAME_LEN] for one in standby.kept.values()][:MAX_KEPT],
            done_number=self._done_number,
            error=self._error,
        )

    async def _carry_out(self, order: StandbyOrder) -> None:
        """Become what is ordered, or say why not."""
        error = "the standby is about to end"
        try:
            body: dict[str, Any] = msgspec.json.decode(order.become, type=dict[str, Any])
            if body.get("model_path") is not None:
                body["from_standby"] = True  # the server may not know yet what it serves
            await self._standby.become(BecomeBody.make(**body))
            error = ""
        except (RequestError, ServiceError, msgspec.DecodeError) as failure:
            error = one_line(failure)
        except Exception as failure:
            logger.exception("an order of the metadata server could not be carried out")
            error = repr(failure)
        finally:
            self._done_number, self._error = order.number, error[:MAX_NAME_LEN]

    def _note_trouble(self, reason: str) -> None:
        if not self._had_trouble:
            logger.warning("the metadata server does not know of this standby: %s; telling it again", reason)
        self._had_trouble = True
