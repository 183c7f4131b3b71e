"""Owns putting an instance to sleep and waking it, on all ranks of all replicas or on none: the main process's side.

An instance that sleeps is paused, nobody is told of its weights, and the memory of those tags is given back that were
named. It wakes when all of them have been taken again; whatever fails before that leaves it asleep.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace

import msgspec

from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.pause_control import PauseControl, SleepMode
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.managers.update_report import Staged, UpdateReport, note_update
from ramet.srt.managers.update_roles import FoundSource
from ramet.srt.managers.weight_sources import instance_source
from ramet.srt.managers.weight_update_control import (
    NoRoomError,
    WeightUpdateControl,
    check_version_name,
    failure_of,
)
from ramet.srt.weights.memory_messages import (
    MEMORY_TAGS,
    AskedTag,
    MemoryStep,
    MemoryTag,
    ReleaseMemoryReq,
    ResumeMemoryReq,
    StartSource,
    WakeSource,
)
from ramet.srt.weights.update_messages import FilesSource, InstanceSource, WeightStepOutput

logger = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 600.0  # host memory for a copy of the weights takes its time to be pinned
RESUME_TIMEOUT_S = 3700.0
WEIGHTS: MemoryTag = "weights"
WILL_COME = "nobody is known who has the weights: an update must bring them"


@dataclass(frozen=True)
class Moved:
    """What memory has gone or come."""

    tags: tuple[MemoryTag, ...]  # that are given back now
    num_bytes: int = 0  # that were given back, or came as weights
    source: str = ""  # of weights that came
    seconds: float = 0.0
    trouble: str = ""  # why others can't take the weights now, or who must bring them


class SleepControl:
    """Sleeps and wakes, one after the other, and never while weights change.

    Args:
        can_sleep: whether the ranks have memory that can be given back.
        keeps_copy: whether weights are copied to host memory when nobody says it.
    """

    def __init__(
        self,
        manager: TokenizerManager,
        pauses: PauseControl,
        updates: WeightUpdateControl,
        *,
        can_sleep: bool,
        keeps_copy: bool,
    ):
        self._manager = manager
        self._pauses = pauses
        self._updates = updates
        self._can_sleep = can_sleep
        self._keeps_copy = keeps_copy
        self._others: set[MemoryTag] = set()  # that are given back, beside weights
        self._has_copy = False
        self._put_off: set[MemoryTag] = set()  # that were asked for, and can't be had but by an update
        self._awaits_update = False  # it sleeps because weights are missing, and nobody has asked for it

    @property
    def is_asleep(self) -> bool:
        """Whether the instance sleeps, or is about to."""
        return self._updates.is_asleep

    @property
    def tags(self) -> tuple[MemoryTag, ...]:
        """What is given back."""
        gone = self._others if self._updates.has_weights else self._others | {WEIGHTS}
        return tuple(tag for tag in MEMORY_TAGS if tag in gone)

    async def release(
        self,
        tags: Collection[AskedTag],
        mode: SleepMode,
        *,
        keeps_copy: bool | None = None,
        made_up: bool = False,
    ) -> Moved:
        """Put the instance to sleep; give the memory of the tags back, if there are any.

        Args:
            mode: what becomes of requests.
            keeps_copy: of the weights, in host memory; None: as the instance was started.
            made_up: also an instance that awaits its first weights: an update must bring them before it wakes.

        Raises:
            RequestError: if it can't be done; what is not said to sleep then is as it was.
            ServiceError: if a replica does not answer.
        """
        if tags and not self._can_sleep:
            raise RequestError("memory is only given back by an instance that was started with --enable-memory-saver")
        copies = self._keeps_copy if keeps_copy is None else keeps_copy
        chosen = [tag for tag in MEMORY_TAGS if tag in tags]
        return await self._updates.shielded(self._release(chosen, mode, copies, made_up=made_up))

    async def resume(self, tags: Collection[AskedTag] | None, address: str | None = None) -> Moved:
        """Take the memory of the tags again, with the weights that were in it. Wakes when nothing is missing any more.

        Args:
            tags: None: all. Weights that nobody has are put off while something else is missing: trainers ask for them
                first, and bring them then.
            address: of an instance that has the weights, to be asked before others.

        Raises:
            RequestError: if it can't be done: the instance sleeps on, with the same memory given back.
            ServiceError: if a replica does not answer: it sleeps on, too.
        """
        chosen = [tag for tag in MEMORY_TAGS if tags is None or tag in tags]
        try:
            asked: list[WakeSource] = [] if address is None else [instance_source(address)]
        except ValueError as error:
            raise RequestError(str(error), param="address") from None
        return await self._updates.shielded(self._resume(chosen, asked))

    async def update(
        self, find: Callable[[], FoundSource], version: str | None, *, abort_all: bool, in_place: bool
    ) -> UpdateReport:
        """As WeightUpdateControl.update.

        Args:
            in_place: the weights that serve may be given up in a pause where there is no room for others beside them.
                If those don't come, the old ones are taken again; if that fails, too, the instance sleeps until it is
                updated or woken.
        """
        check_version_name(version)
        return await self._updates.shielded(self._update(find, version, abort_all, in_place))

    async def _update(
        self, find: Callable[[], FoundSource], version: str | None, abort_all: bool, in_place: bool
    ) -> UpdateReport:
        async with self._updates.turn():
            update = functools.partial(self._updates.update_now, find, version, abort_all)
            try:
                report = await update()
            except NoRoomError as error:
                if not in_place or not self._updates.has_weights:
                    raise
                logger.info("the weights that serve make room for others: %s", error)
                return await self._update_in_place(update)
            note_update(report)
        await self.note_updated()
        return report

    async def note_updated(self) -> None:
        """Weights have come that can serve: an instance that sleeps only for want of them wakes."""
        if self._awaits_update:
            await self.resume(())

    async def _update_in_place(self, update: Callable[[], Awaitable[UpdateReport]]) -> UpdateReport:
        """Nobody comes between giving up what serves and serving something again."""
        begun = time.perf_counter()
        was_asleep = self.is_asleep
        await self._release_now([WEIGHTS], None if was_asleep else "keep", copies=False)
        try:
            report = await update()
        except (RequestError, ServiceError) as error:
            try:
                await self._take([WEIGHTS], [])
                if not was_asleep:
                    await self._resume_now([], [])
            except (RequestError, ServiceError) as second:
                self._awaits_update = not was_asleep
                await self._pauses.fall_asleep("abort")
                gone = f"the old weights are gone, too, and the instance sleeps until others come: {second}"
                raise RequestError(f"{error}; {gone}") from None
            raise
        try:
            if not was_asleep:
                await self._resume_now([], [])
        finally:  # it has come, whether the instance wakes or not
            report = replace(report, mode="in_place", pause_s=time.perf_counter() - begun)
            note_update(report)
        return report

    async def _release(self, tags: list[MemoryTag], mode: SleepMode, copies: bool, *, made_up: bool) -> Moved:
        async with self._updates.turn(changes=False):
            return await self._release_now(tags, mode, copies, made_up=made_up)

    async def _release_now(
        self, tags: list[MemoryTag], mode: SleepMode | None, copies: bool, *, made_up: bool = False
    ) -> Moved:
        """As `release`. A mode of None leaves requests what the sleep that lasts has made of them."""
        begun = time.perf_counter()
        new = [tag for tag in tags if tag not in self.tags]
        if self._updates.current.is_made_up and not made_up:
            raise RequestError("no weights are there that can serve: an instance sleeps with such weights alone")
        if mode is not None:
            await self._pauses.fall_asleep(mode, keeps_cache="kv_cache" not in (*self.tags, *new))
        was_asleep = self.is_asleep
        try:
            await self._updates.withdraw(asleep=True)
        except BaseException:
            await self._undo([], was_asleep)  # no memory was asked for, and ranks that offer it refuse to move it
            raise
        self._updates.is_asleep = True
        try:
            question = functools.partial(ReleaseMemoryReq, tags=new, keeps_copy=copies)
            replies = await self._ask(question, RELEASE_TIMEOUT_S)
        except BaseException:
            await self._undo(new, was_asleep)
            raise
        if failure := failure_of(replies):
            await self._undo(new, was_asleep)
            raise RequestError(f"the instance can't sleep: {failure}")
        self._note_gone(new, copies)
        self._put_off.clear()
        if WEIGHTS in new and self._updates.kept:
            await self._updates.drop_kept()
            await self._ask(functools.partial(ReleaseMemoryReq, tags=[], keeps_copy=copies), RELEASE_TIMEOUT_S)
        moved = Moved(self.tags, Staged.of(replies).num_bytes, seconds=time.perf_counter() - begun)
        logger.info("asleep after %.3f s: %d bytes given back (%s)",
                    moved.seconds, moved.num_bytes, ", ".join(new) or "none")  # fmt: skip
        return moved

    def _note_gone(self, tags: Sequence[MemoryTag], copies: bool) -> None:
        self._others |= {tag for tag in tags if tag != WEIGHTS}
        if WEIGHTS in tags:
            self._updates.has_weights, self._has_copy = False, copies

    async def _undo(self, tags: list[MemoryTag], was_asleep: bool) -> None:
        """Have back what some ranks may have given back. If that fails, the instance sleeps, and says so."""
        self._note_gone(tags, copies=True)
        try:
            await self._take(tags, [])
            if not was_asleep:
                await self._wake()
        except (RequestError, ServiceError) as error:
            self._updates.is_asleep = True
            logger.error("a sleep that has failed can't be undone, so the instance sleeps: %s", error)

    async def _resume(self, tags: list[MemoryTag], asked: list[WakeSource]) -> Moved:
        async with self._updates.turn(changes=False):
            return await self._resume_now(tags, asked)

    async def _resume_now(self, tags: list[MemoryTag], asked: list[WakeSource]) -> Moved:
        begun = time.perf_counter()
        if not self.is_asleep:
            return Moved(())
        came = await self._take(self._due(tags, asked), asked)
        trouble = (WILL_COME if self._put_off else "") if self.tags else await self._wake()
        seconds = time.perf_counter() - begun
        state = f"asleep ({', '.join(self.tags)})" if self.tags else "awake"
        weights = f", {came.num_bytes} bytes of weights from {came.source}" if came.source else ""
        logger.info("%s after %.3f s%s", state, seconds, weights)
        return Moved(self.tags, came.num_bytes, came.source, seconds, trouble)

    def _due(self, tags: Collection[MemoryTag], asked: list[WakeSource]) -> list[MemoryTag]:
        """What is to be taken now of the tags, and of what was put off when it was asked for."""
        due = [tag for tag in self.tags if tag in tags or tag in self._put_off]
        can_be_had = self._has_copy or asked or self._known_sources()
        is_put_off = WEIGHTS in due and not can_be_had and len(due) < len(self.tags)
        self._put_off = {WEIGHTS} if is_put_off else set()
        return [tag for tag in due if tag not in self._put_off]

    async def _take(self, tags: list[MemoryTag], asked: list[WakeSource]) -> Staged:
        """Raises RequestError if a rank can't: then all ranks have given it back again."""
        if not tags:
            return Staged()
        question = functools.partial(ResumeMemoryReq, tags=tags, sources=[*asked, *self._known_sources()])
        replies = await self._ask(question, RESUME_TIMEOUT_S)
        if failure := failure_of(replies):
            with contextlib.suppress(ServiceError):  # what a rank has taken is taken from it when it is asked again
                again = functools.partial(ReleaseMemoryReq, tags=tags, keeps_copy=self._has_copy)
                await self._ask(again, RELEASE_TIMEOUT_S)
            raise RequestError(f"the instance can't wake, and sleeps on: {failure}")
        self._others -= set(tags)
        if WEIGHTS in tags:
            self._updates.has_weights, self._has_copy = True, False
        return Staged.of(replies)

    def _known_sources(self) -> list[WakeSource]:
        """Where the weights that serve are from."""
        match self._updates.current:
            case content if content.number == 0:
                return [StartSource()]
            case content if isinstance(content.source, FilesSource):
                return [msgspec.structs.replace(content.source, files=[])]  # checksums tell what they are
            case content if isinstance(content.source, InstanceSource):
                return [content.source]
        return []

    async def _wake(self) -> str:
        """Serve again; why others can't take the weights, or "". Raises ServiceError if a replica does not answer."""
        await self._pauses.wake()
        self._updates.is_asleep = self._awaits_update = False
        return await self._updates.offer()

    async def _ask(self, question: Callable[..., MemoryStep], timeout_s: float) -> list[WeightStepOutput]:
        return await self._manager.ask_all(question, WeightStepOutput, timeout_s)
