"""Owns pausing all replicas of an instance, and what requests meet meanwhile: the main process's side.

In a pause the processes, the weights and the prefix cache stay as they are, and no pass is planned. Requests that come
wait at their replica, as those in a queue do, or are refused.
"""

import asyncio
import functools

from ramet.srt.errors import RequestError
from ramet.srt.managers.io_struct import ContinueReqInput, ContinueReqOutput, PauseMode, PauseReqInput, PauseReqOutput
from ramet.srt.managers.tokenizer_manager import TokenizerManager

PAUSE_TIMEOUT_S = 60.0  # for the passes under way to end
REFUSAL = "generation is paused, and requests are refused until it is resumed"


class PauseControl:
    """One pause at a time: another one while it lasts changes what becomes of requests, and one `go_on` ends both."""

    def __init__(self, manager: TokenizerManager):
        self._manager = manager
        self._turn = asyncio.Lock()
        self._is_paused = False
        self._overtaken = asyncio.Event()  # set when something comes that makes a wait for requests to end vain

    @property
    def is_paused(self) -> bool:
        """Whether no pass is planned, or some replica has at least been told so."""
        return self._is_paused

    @property
    def reason(self) -> str | None:
        """Why no request is answered now, or none that comes now; None if they are."""
        return (
            self._manager.weights_refusal
            or self._manager.pause_refusal
            or ("generation is paused" if self._is_paused else None)
        )

    @property
    def holds_requests(self) -> bool:
        """Whether nothing is computed because somebody has asked for that: it is no sickness."""
        return self._is_paused or self._manager.weights_refusal is not None

    async def pause(self, mode: PauseMode, *, refuses: bool = False) -> int:
        """Have every replica plan no further pass.

        Args:
            mode: what becomes of the requests that run or wait: see Scheduler.pause.
            refuses: whether requests that come are refused, and don't wait.

        Returns:
            How many requests wait for the end of the pause.

        Raises:
            ServiceError: if a replica does not answer. The pause must be ended nevertheless.
        """
        self._overtake()
        async with self._turn:
            return await self._pause(mode, refuses)

    async def _pause(self, mode: PauseMode, refuses: bool) -> int:
        self._manager.pause_refusal = REFUSAL if refuses else None
        self._is_paused = True
        question = functools.partial(PauseReqInput, mode=mode)
        replies = await self._manager.ask_all(question, PauseReqOutput, PAUSE_TIMEOUT_S)
        return sum(reply.num_held for reply in replies)

    async def pause_when_idle(self) -> None:
        """Refuse requests from now on, let those that are there end, and pause then.

        Raises:
            RequestError: if a pause holds requests already, or another pause or the end of one comes meanwhile.
            ServiceError: as `pause`.
        """
        if self._is_paused and self._manager.num_running:
            raise RequestError(
                f"{self._manager.num_running} requests are held by a pause and would never end: resume it first"
            )
        self._manager.pause_refusal = REFUSAL
        overtaken = self._overtaken
        waits = [asyncio.create_task(wait) for wait in (self._manager.wait_idle(), overtaken.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        async with self._turn:
            if overtaken.is_set():
                raise RequestError("another pause, or the end of one, came before all requests had ended")
            await self._pause("in_place", refuses=True)

    def _overtake(self) -> None:
        self._overtaken.set()
        self._overtaken = asyncio.Event()

    async def go_on(self) -> None:
        """End the pause, if there is one. Raises ServiceError if a replica does not answer: then it lasts."""
        self._overtake()
        async with self._turn:
            await self._manager.ask_all(ContinueReqInput, ContinueReqOutput)
            self._is_paused = False
            self._manager.pause_refusal = None
