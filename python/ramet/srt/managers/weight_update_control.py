"""Owns changing the weights of an instance, on all ranks of all replicas or on none: the main process's side.

Each step is asked of every replica and ends before the next one begins. Until the switch everything can be undone. A
replica that does not answer a switch leaves nobody able to tell what it serves: the instance ends then.
"""

import asyncio
import contextlib
import functools
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.managers.update_report import Content, Staged, UpdateReport, note_update
from ramet.srt.managers.update_roles import Doors, FoundSource, Life
from ramet.srt.weights.errors import name_some
from ramet.srt.weights.update_messages import (
    OTHER_TENSORS,
    DropWeightsReq,
    MadeUpSource,
    OfferWeightsReq,
    StageWeightsReq,
    SwitchWeightsReq,
    WeightStepOutput,
)
from ramet.srt.weights.version import check_version

logger = logging.getLogger(__name__)

STAGE_TIMEOUT_S = 3700.0
OFFER_TIMEOUT_S = 120.0
SWITCH_TIMEOUT_S = 600.0
DROP_TIMEOUT_S = 60.0
RESET = "the weights have been reset: an update or a rollback must restore them first"
OPEN = (
    "a session (/begin_weight_update) is open, or tensors come while the instance sleeps, of which not all have come "
    "yet: end it first (/end_weight_update)"
)
Result = TypeVar("Result")
NUM_TRIES = 3  # of a source whose content changes while it is taken


class NoRoomError(RequestError):
    """There is no memory for other weights beside those that serve."""


def check_version_name(version: str | None) -> None:
    """Raises RequestError if it is no name for weights; None is one that is made up."""
    if version is not None:
        try:
            check_version(version, "weight_version")
        except ValueError as error:
            raise RequestError(str(error), param="weight_version") from None


class WeightUpdateControl:
    """Updates and ways back, one after the other.

    Args:
        origin: where what the instance was started with is from.
        num_kept: contents that stay staged for a way back.
        doors: those to other instances.
        life: of the instance that the replicas are of.
        turn: held by whoever changes the weights or their version's name.
        adapters_turn: held by whoever loads adapters: none is loaded while weights change.
    """

    def __init__(
        self,
        manager: TokenizerManager,
        origin: str,
        num_kept: int,
        doors: Doors,
        life: Life,
        turn: asyncio.Lock,
        adapters_turn: asyncio.Lock,
    ):
        self._manager = manager
        self._doors = doors
        self._life = life
        self._num_kept = num_kept
        self._own_path = origin
        self._adapters_turn = adapters_turn
        self._last_number = 0
        self._current = Content(0, "", origin, origin)
        self.kept: list[Content] = []  # the newest first
        self._turn = turn
        self._tasks: set[asyncio.Task[Any]] = set()
        self.has_session = False  # whether tensors may come for content that is not complete yet
        self.is_asleep = False  # nobody is told of the weights
        self.has_weights = True  # False while their memory is given back: what is staged takes its place

    @property
    def current(self) -> Content:
        """What serves, by the name that it has now."""
        return replace(self._current, version=self._manager.weight_version)

    def await_first(self) -> None:
        """Say of what the instance was started with that it is none to serve: the first update brings that."""
        self._current = replace(self._current, origin="nowhere", is_made_up=True)

    @staticmethod
    def has_come(content: Content) -> bool:
        """Whether it is there at all, rather than awaited."""
        return bool(content.number) or not content.is_made_up

    @property
    def has_base(self) -> bool:
        """Whether weights are there that stay where nothing comes in their place."""
        return self.has_weights and not self._current.is_made_up

    @property
    def model_path(self) -> str:
        """Folder or hub id of what serves; the instance's own where that is from no files."""
        return self._current.model_path or self._own_path

    async def update(
        self, find: Callable[[], FoundSource], version: str | None, *, abort_all: bool = False
    ) -> UpdateReport:
        """Stage what `find`, in a thread, has found, and switch to it.

        Args:
            version: its name; None makes one up.
            abort_all: end the requests that have not ended before the switch.

        Raises:
            RequestError: if it can't be done; the message says why, and what served before still serves.
            ServiceError: if a replica does not answer.
        """
        check_version_name(version)
        return await self.shielded(self._update(find, version, abort_all))

    async def rollback(self, *, abort_all: bool = False) -> UpdateReport:
        """Switch back to what served before. Raises what `update` raises."""
        return await self.shielded(self._rollback(abort_all))

    async def reset(self) -> UpdateReport:
        """End all requests, put made-up weights in the place of those that serve, and serve nothing.

        An update or a rollback ends that. Other instances can't come for the weights before.

        Raises what `update` raises; then the instance serves what it has served.
        """
        return await self.shielded(self._reset())

    async def shielded(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Who has asked may go away: the steps are taken to the end all the same."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _update(self, find: Callable[[], FoundSource], version: str | None, abort_all: bool) -> UpdateReport:
        async with self.turn():
            report = await self.update_now(find, version, abort_all)
            note_update(report)
            return report

    async def update_now(self, find: Callable[[], FoundSource], version: str | None, abort_all: bool) -> UpdateReport:
        """As `update`, for whoever has the turn; who notes the report when nothing of it will change any more."""
        for _ in range(NUM_TRIES):
            found = await self._in_thread(find)
            has_it = False
            try:
                report = await self._try(found, version, abort_all)
                has_it = report is not None
            finally:
                await asyncio.to_thread(found.end, has_it=has_it)  # it may talk to a server
            if report is not None:
                return report
            logger.info("%s has other weights now than when they were asked for: starting over", found.origin)
        raise RequestError(f"{found.origin} has changed its weights {NUM_TRIES} times while they were taken")

    async def _try(self, found: FoundSource, version: str | None, abort_all: bool) -> UpdateReport | None:
        """None if it has other weights now than when it was found."""
        number = await self.new_number()
        question = functools.partial(StageWeightsReq, number=number, source=found.source)
        try:
            staged = await self.stage(question, number)
        except NoRoomError:
            raise
        except RequestError:
            if await self._has_changed(found):
                return None
            raise
        if not await self._is_unchanged(found, number):
            await self.drop(number)
            return None
        name = version or found.version or f"update-{number}"
        content = Content(number, name, found.origin, found.model_path, found.source)
        return await self.serve(content, Staged.of(staged), abort_all=abort_all)

    async def _rollback(self, abort_all: bool) -> UpdateReport:
        async with self.turn():
            if not self.kept:
                raise RequestError("no version before this one is staged (--keep-weight-versions)")
            report = await self._switch_to(self.kept[0], abort_all)
            note_update(report)
            return report

    # -- Steps of an update, also those of a session: see weight_sessions.py

    @contextlib.asynccontextmanager
    async def turn(self, *, session: bool = False, changes: bool = True) -> AsyncIterator[None]:
        """Around an update: nobody else changes weights, their name or adapters meanwhile.

        Args:
            session: of the session that is open, if there is one; any other update is refused while there is.
            changes: the weights are others afterwards, which adapters don't belong to.

        Raises:
            RequestError: if adapters are loaded and the weights change, or a session is open.
        """
        async with self._turn, self._adapters_turn:
            if changes:
                self._check_adapters()
            if self.has_session and not session:
                raise RequestError(OPEN)
            yield

    async def new_number(self) -> int:
        """Of content that is about to be staged, for which there is room afterwards."""
        await self._make_room()
        self._last_number += 1
        return self._last_number

    async def serve(self, content: Content, staged: Staged, *, abort_all: bool) -> UpdateReport:
        """Switch to what all ranks have staged and verified; it is dropped if that fails. Who calls it notes it."""
        try:
            report = await self._switch_to(content, abort_all)
        except BaseException:
            await self.drop(content.number)
            raise
        return replace(
            report,
            source=staged.source,
            num_bytes=staged.num_bytes,
            stage_s=staged.seconds,
            transfer_s=staged.transfer_s,
            mode=staged.mode,
        )

    async def _reset(self) -> UpdateReport:
        async with self.turn():
            number = await self.new_number()
            source = MadeUpSource(random_seed=random.getrandbits(62))
            staged = await self.stage(functools.partial(StageWeightsReq, number=number, source=source), number)
            content = Content(number, "reset", "nowhere", None, is_made_up=True)
            report = await self.serve(content, Staged.of(staged), abort_all=True)
            note_update(report)
            return report

    def _check_adapters(self) -> None:
        """An adapter is made for the weights that it was trained with; its sum with others is nobody's model."""
        if names := self._manager.adapters.names():
            raise RequestError(
                f"adapters are loaded, which belong to the weights that serve now: unload {name_some(names)} first"
            )

    async def _make_room(self) -> None:
        """Drop what would be one too many after the switch: memory need only hold so much beside what is staged."""
        while len(self.kept) >= max(1, self._num_kept):
            await self.drop(self.kept.pop().number)

    async def stage(self, question: Callable[..., Any], number: int) -> list[WeightStepOutput]:
        """Have all ranks take a step toward content of that number; it is dropped if one of them can't.

        Raises:
            RequestError: with the reason.
            ServiceError: if a replica does not answer.
        """
        try:
            replies = await self._ask(question, STAGE_TIMEOUT_S)
        except BaseException:
            await self.drop(number)
            raise
        if failure := failure_of(replies):
            await self.drop(number)
            lacking = [reply.lacks_memory for reply in replies if not reply.success]
            kind = NoRoomError if lacking and all(lacking) else RequestError
            raise kind(f"the weights can't be changed, and are what they were: {failure}")
        return replies

    async def _has_changed(self, found: FoundSource) -> bool:
        """Whether it has other weights now than when it was found, which then may be why they could not be taken."""
        try:
            return not await self._in_thread(found.is_unchanged)
        except RequestError:
            return False  # it may have ended

    async def _is_unchanged(self, found: FoundSource, number: int) -> bool:
        try:
            return await self._in_thread(found.is_unchanged)
        except RequestError:
            await self.drop(number)
            raise

    async def _switch_to(self, content: Content, abort_all: bool) -> UpdateReport:
        """Serve what all ranks have staged."""
        try:
            await self.withdraw()
        except BaseException:
            await self.offer()
            raise
        if content.is_made_up:
            self._manager.weights_refusal = RESET
        if abort_all:
            self._manager.abort_all()
        question = functools.partial(SwitchWeightsReq, number=content.number, version=content.version)
        try:
            replies = await self._ask(question, SWITCH_TIMEOUT_S)
        except ServiceError as error:
            self._life.end(f"a replica has not said whether it has switched to other weights: {error}")
            raise
        replaced = self.current
        self.kept = [one for one in self.kept if one != content]
        if replaced.is_made_up or not self.has_weights:
            await self.drop(replaced.number)
            self.has_weights = True
        else:
            self.kept.insert(0, replaced)
        self._current = replace(content, since=time.time())
        self._manager.note_weight_version(content.version)
        while len(self.kept) > self._num_kept:
            await self.drop(self.kept.pop().number)
        trouble = await self.offer()
        if not content.is_made_up:
            self._manager.weights_refusal = None
        return UpdateReport(
            version=content.version,
            origin=content.origin,
            pause_s=max(reply.pause_s for reply in replies),
            num_reqs=sum(reply.num_reqs for reply in replies),
            trouble=trouble,
        )

    # -- What others are told

    async def withdraw(self, *, asleep: bool = False) -> None:
        """Tell others that these weights are about to go. Raises RequestError if a rank can't."""
        if self._doors.gives_weights and not self.is_asleep:
            self._doors.close_for_weights(asleep=asleep)
            replies = await self._ask(functools.partial(OfferWeightsReq, is_offered=False), OFFER_TIMEOUT_S)
            if failure := failure_of(replies):
                raise RequestError(f"the weights can't be withdrawn from other instances: {failure}")

    async def offer(self) -> str:
        """Let others take what serves now, if anything may; why they can't, or ""."""
        if not self._doors.gives_weights or self.is_asleep or self._current.is_made_up:
            return ""
        try:
            failure = failure_of(await self._ask(functools.partial(OfferWeightsReq, is_offered=True), OFFER_TIMEOUT_S))
        except ServiceError as error:
            failure = str(error)
        if failure:
            logger.error("other instances can't take the weights: %s", failure)
            return f"but other instances can't take them: {failure}"
        self._doors.open_for_weights()
        return ""

    async def drop_kept(self) -> None:
        """Give up every way back."""
        while self.kept:
            await self.drop(self.kept.pop().number)

    async def drop(self, number: int) -> None:
        """Forget staged content, on all ranks."""
        try:
            await self._ask(functools.partial(DropWeightsReq, number=number), DROP_TIMEOUT_S)
        except ServiceError as error:
            logger.warning("staged weights may still take memory: %s", error)

    async def _ask(self, question: Callable[..., Any], timeout_s: float) -> list[WeightStepOutput]:
        return await self._manager.ask_all(question, WeightStepOutput, timeout_s)

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        try:
            return await asyncio.to_thread(work)
        except RequestError:
            raise
        except (ValueError, OSError, RuntimeError) as error:
            raise RequestError(str(error)) from None


def failure_of(replies: list[WeightStepOutput]) -> str:
    """Why not all replicas have taken a step; "" if they have."""
    failures = dict.fromkeys(reply.message for reply in replies if not reply.success)
    if not failures and len({reply.received for reply in replies}) > 1:
        return OTHER_TENSORS
    return "; ".join(failures)
