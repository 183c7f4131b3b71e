"""Owns an instance's life in its fleet: reports, and taking the target version when it is its turn."""

import asyncio
import functools
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.errors import RequestError, ServiceError, one_line
from ramet.srt.managers.fleet_member import FleetMember
from ramet.srt.managers.pause_control import PauseControl
from ramet.srt.managers.sleep_control import SleepControl
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.managers.weight_sources import find_listed
from ramet.srt.managers.weight_update_control import WeightUpdateControl
from ramet.srt.utils.net import format_url
from ramet.srt.weights.fleet import FleetOrder, FleetTarget

if TYPE_CHECKING:
    from ramet.srt.modelexpress.client.client import ModelExpressClient

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 5.0
GRACE_S = 10.0  # of a server's silence, after which an instance that was never ready serves what it has
OLD_SERVER_PAUSE_S = 30.0  # between two questions to a server that knows nothing of fleets
NUM_TRIES = 3
RETRY_S = 2.0


class FleetMembership:
    """Of one instance that a metadata server lists. `obstacle` is asked by /ready.

    Args:
        config: what the instance is called, and how it holds its weights.
        address: host and port at which others find it.
        may_give: whether others may take its weights.
    """

    def __init__(
        self,
        config: LoadConfig,
        address: tuple[str, int],
        manager: TokenizerManager,
        pauses: PauseControl,
        updates: WeightUpdateControl,
        sleep: SleepControl,
        *,
        may_give: bool,
    ) -> None:
        self._config, self._address, self._may_give = config, address, may_give
        self._manager, self._pauses, self._updates, self._sleep = manager, pauses, updates, sleep
        self._started_at = time.monotonic()
        self._member = FleetMember(config.modelexpress_model_name, format_url(*address), time.time())
        self._taking: asyncio.Task[None] | None = None
        self._had_trouble = False

    @property
    def obstacle(self) -> str | None:
        """Why the instance is not ready, as far as its fleet goes; None if it is."""
        return self._member.obstacle(self._served)

    @property
    def _served(self) -> str:
        """The version that the instance serves; "" while its weights are none to serve: no fleet goes back to those."""
        return "" if self._manager.weights_refusal is not None else self._manager.weight_version

    async def run(self) -> None:
        """Report until cancelled."""
        client = None
        try:
            while True:
                pause_s = 1.0
                try:
                    if client is None:
                        client = await asyncio.to_thread(self._connect)
                    if not self._sleep.is_asleep:
                        pause_s = await self._report(client)
                except (ValueError, OSError) as error:  # a certificate that can't be read, an answer that is none
                    self._note_trouble(one_line(error))
                await asyncio.sleep(pause_s)
        finally:
            if self._taking is not None:
                self._taking.cancel()
            if client is not None:
                client.close()

    def _connect(self) -> "ModelExpressClient":
        from ramet.srt.modelexpress.client.client import ModelExpressClient  # imports grpc

        return ModelExpressClient(self._config.modelexpress_url, timeout_s=CALL_TIMEOUT_S)

    async def _report(self, client: "ModelExpressClient") -> float:
        """Seconds until the next report."""
        from ramet.srt.modelexpress.client.client import ModelExpressError

        manager = self._manager
        is_ready = manager.refusal is None and self._pauses.reason is None
        report = self._member.report(self._served, is_ready=is_ready)
        try:
            answer = await asyncio.to_thread(client.call_fleet, "Report", msgspec.json.encode(report))
        except ModelExpressError as error:
            if error.code == "UNIMPLEMENTED":
                self._member.go_alone()
                return OLD_SERVER_PAUSE_S
            self._note_trouble(str(error))
            return 1.0
        self._had_trouble = False
        order = msgspec.json.decode(answer, type=FleetOrder)
        target = self._member.take_order(order, self._served)
        if target is not None:
            self._taking = asyncio.create_task(self._take(target))
        return order.pause_s

    def _note_trouble(self, reason: str) -> None:
        if not self._had_trouble:
            logger.warning("the fleet's target is not known: %s; asking again", reason)
        self._had_trouble = True
        if time.monotonic() - self._started_at > GRACE_S:
            self._member.go_alone()

    async def _take(self, target: FleetTarget) -> None:
        """Serve the target, or say why not."""
        logger.info("it is this instance's turn to serve the version %r", target.version)
        error = "the instance is about to end"
        try:
            for attempt in range(NUM_TRIES):
                try:
                    await self._try(target.version)
                    error = ""
                    break
                except (RequestError, ServiceError) as failure:
                    error = str(failure)
                    logger.warning("the version %r can't be served: %s", target.version, error)
                if self._member.known != target or attempt + 1 == NUM_TRIES:
                    break
                await asyncio.sleep(RETRY_S)
        except Exception as failure:
            logger.exception("taking the version %r has failed", target.version)
            error = repr(failure)
        finally:
            self._member.note_taken(target, self._served, error)

    async def _try(self, version: str) -> None:
        kept = self._updates.kept
        if kept and kept[0].version == version:
            await self._updates.rollback()
            return
        find = functools.partial(find_listed, self._config, None, version, self._address, None, may_give=self._may_give)
        await self._sleep.update(find, version, abort_all=False, in_place=False)
