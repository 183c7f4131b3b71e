"""Owns the processes of a standby that wait for a model: one set of them, which is replaced when it is taken."""

import asyncio
import logging
from collections.abc import Callable

from ramet.srt.entrypoints.child_processes import LaunchError
from ramet.srt.entrypoints.standby.life import Life
from ramet.srt.errors import ServiceError, one_line

logger = logging.getLogger(__name__)

RETRY_S = 5.0  # after processes that have ended by themselves


class Spares:
    """Made on the event loop; the first are warmed up at once.

    Args:
        make: a life without a model.
    """

    def __init__(self, make: Callable[[], Life]):
        self._make = make
        self._is_closed = False
        self._warming: asyncio.Task[Life] | None = asyncio.create_task(self._warm_up(0.0))

    @property
    def is_warm(self) -> bool:
        """Whether processes wait for a model now."""
        return self._spare is not None

    @property
    def _spare(self) -> Life | None:
        task = self._warming
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            return None
        return task.result()

    async def wait(self) -> None:
        """Wait until some are warm. Raises LaunchError or OSError if none can be had."""
        assert self._warming is not None
        await asyncio.shield(self._warming)

    async def take(self) -> Life:
        """Those that are warm, or will be soon; `replace` brings others.

        Raises:
            ServiceError: if there can't be any.
        """
        if self._warming is None:
            self.replace()
        assert self._warming is not None
        try:
            life = await asyncio.shield(self._warming)
        except (LaunchError, OSError) as error:
            self.replace()
            raise ServiceError(f"no processes can be started: {one_line(error)}") from None
        self._warming = None
        return life

    def give_back(self, life: Life) -> None:
        """They were not needed."""

        async def again() -> Life:
            return life

        self._warming = asyncio.create_task(again())

    def replace(self, *, delay_s: float = 0.0) -> None:
        """Begin to warm others up."""
        if not self._is_closed:
            self._warming = asyncio.create_task(self._warm_up(delay_s))
            self._warming.add_done_callback(_note_failure)

    async def _warm_up(self, delay_s: float) -> Life:
        await asyncio.sleep(delay_s)
        life = self._make()
        try:
            await life.warm_up()
        except BaseException:
            await life.end()
            raise
        return life

    def note_death(self, life: Life) -> bool:
        """A life has ended by itself; whether it was the one here, which is replaced then."""
        if self._spare is not life:
            return False
        logger.error("processes that waited for a model have ended: %s", life.death)
        self.replace(delay_s=RETRY_S)
        return True

    async def close(self) -> None:
        """End them."""
        self._is_closed = True
        task, self._warming = self._warming, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            await task.result().end()


def _note_failure(task: "asyncio.Task[Life]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("no processes can be started for the next model: %s", one_line(error))
