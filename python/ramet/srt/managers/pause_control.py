"""Owns pausing all replicas of an instance, and what requests meet meanwhile: the main process's side.

In a pause the processes, the weights and the prefix cache stay as they are, and no pass is planned. Requests that come
wait at their replica, as those in a queue do, or are refused. An instance that sleeps is paused, too: such a pause ends
when it wakes, and no sooner.
"""

import asyncio
import contextlib
import functools
from typing import Literal

from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.io_struct import ContinueReqInput, ContinueReqOutput, PauseMode, PauseReqInput, PauseReqOutput
from ramet.srt.managers.tokenizer_manager import TokenizerManager

PAUSE_TIMEOUT_S = 60.0  # for the passes under way to end
REFUSAL = "generation is paused, and requests are refused until it is resumed"
SLEEP_REFUSAL = "the instance is asleep, and requests are refused until it wakes"

SleepMode = Literal["abort", "wait", "keep"]  # what becomes of requests: WIRE, vLLM's words


class PauseControl:
    """One pause at a time: another one while it lasts changes what becomes of requests, and one `go_on` ends both."""

    def __init__(self, manager: TokenizerManager):
        self._manager = manager
        self._turn = asyncio.Lock()
        self._is_asked_for = False  # by somebody, beside a sleep
        self._is_asleep = False
        self._refusal_awake: str | None = None  # of the pause that a sleep has come upon
        self._refusal_asleep: str | None = None  # that the sleep has asked for, whatever pause has come upon it
        self._overtaken = asyncio.Event()  # set when something comes that makes a wait for requests to end vain

    @property
    def is_paused(self) -> bool:
        """Whether no pass is planned, or some replica has at least been told so."""
        return self._is_asked_for or self._is_asleep

    @property
    def reason(self) -> str | None:
        """Why no request is answered now, or none that comes now; None if they are."""
        if self._is_asleep:
            return self._manager.pause_refusal or "the instance is asleep"
        return (
            self._manager.weights_refusal
            or self._manager.pause_refusal
            or ("generation is paused" if self.is_paused else None)
        )

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
            self._is_asked_for = True
            return await self._pause(mode, REFUSAL if refuses else None)

    async def _pause(self, mode: PauseMode, refusal: str | None) -> int:
        self._manager.pause_refusal = self._refusal_awake = refusal
        question = functools.partial(PauseReqInput, mode=mode)
        replies = await self._manager.ask_all(question, PauseReqOutput, PAUSE_TIMEOUT_S)
        return sum(reply.num_held for reply in replies)

    async def pause_when_idle(self) -> None:
        """Refuse requests from now on, let those that are there end, and pause then.

        Raises:
            RequestError: if a pause holds requests already, or another pause or the end of one comes meanwhile.
            ServiceError: as `pause`.
        """
        overtaken = await self._wait_idle(REFUSAL)
        async with self._turn:
            self._check_not(overtaken)
            self._is_asked_for = True
            await self._pause("in_place", REFUSAL)

    async def _wait_idle(self, refusal: str) -> asyncio.Event:
        """Refuse requests, and wait until those have ended that are there; what is set if that is not for long."""
        if self.is_paused and self._manager.num_running:
            raise RequestError(
                f"{self._manager.num_running} requests are held by a pause and would never end: resume it first"
            )
        self._manager.pause_refusal = refusal
        overtaken = self._overtaken
        waits = [asyncio.create_task(wait) for wait in (self._manager.wait_idle(), overtaken.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return overtaken

    @staticmethod
    def _check_not(overtaken: asyncio.Event) -> None:
        if overtaken.is_set():
            raise RequestError("another pause, or the end of one, came before all requests had ended")

    def _overtake(self) -> None:
        self._overtaken.set()
        self._overtaken = asyncio.Event()

    async def go_on(self) -> None:
        """End the pause, if there is one; of an instance that sleeps that one which was asked for beside: it sleeps on.

        Raises:
            RequestError: if nothing but sleep pauses the instance.
            ServiceError: if a replica does not answer: then the pause lasts.
        """
        self._check_can_go_on()
        self._overtake()
        async with self._turn:
            self._check_can_go_on()  # it may have fallen asleep since
            if self._is_asleep:
                self._is_asked_for, self._refusal_awake = False, None
                self._manager.pause_refusal = self._refusal_asleep
            else:
                await self._go_on()

    def _check_can_go_on(self) -> None:
        if self._is_asleep and not self._is_asked_for:
            raise RequestError("the instance is asleep: wake it first (/resume_memory_occupation, /wake_up)")

    async def _go_on(self) -> None:
        await self._manager.ask_all(ContinueReqInput, ContinueReqOutput)
        self._is_asked_for = self._is_asleep = False
        self._manager.pause_refusal = None

    async def fall_asleep(self, mode: SleepMode, *, keeps_cache: bool = False) -> None:
        """Pause until `wake`. An instance that is asleep may do it again, with another mode.

        Args:
            mode: "abort" ends the requests that are there, "wait" lets them end first, and both refuse those that come;
                "keep" has all of them wait.
            keeps_cache: those that run and wait keep their KV cache; else they start over from their tokens afterwards.

        Raises:
            RequestError, ServiceError: as pauses do. Nothing has changed then.
        """
        was_asleep, before = self._is_asleep, self._manager.pause_refusal
        refusal_awake = self._refusal_awake if was_asleep else before
        overtaken = await self._wait_idle(SLEEP_REFUSAL) if mode == "wait" else None
        if overtaken is None:
            self._overtake()
        async with self._turn:
            if overtaken is not None:
                self._check_not(overtaken)
            self._is_asleep = True
            try:
                pause_mode: PauseMode = "abort" if mode == "abort" else "in_place" if keeps_cache else "retract"
                refusal = None if mode == "keep" else SLEEP_REFUSAL
                await self._pause(pause_mode, refusal)
                self._refusal_asleep = refusal
            except BaseException:
                if not (was_asleep or self._is_asked_for):
                    with contextlib.suppress(ServiceError):
                        await self._go_on()
                self._is_asleep, self._manager.pause_refusal = was_asleep, before
                raise
            finally:
                self._refusal_awake = refusal_awake

    async def wake(self) -> None:
        """End the pause that a sleep is; one that somebody has asked for lasts. Raises ServiceError as `go_on` does."""
        async with self._turn:
            if self._is_asked_for:
                self._is_asleep = False
                self._manager.pause_refusal = self._refusal_awake
            elif self._is_asleep:
                await self._go_on()
