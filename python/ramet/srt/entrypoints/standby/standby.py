"""Owns a standby: which of its lives serves, which are put down and kept, and how one takes another's place.

A change has two ends only: the model that was asked for serves, or all is as it was.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from ramet.srt.entrypoints.read_model import read_model
from ramet.srt.entrypoints.standby.life import Life, Weights
from ramet.srt.entrypoints.standby.orders import BecomeBody, server_args_of, shape_key, shape_of
from ramet.srt.entrypoints.standby.spares import Spares
from ramet.srt.entrypoints.standby.standby_metrics import StandbyMetrics
from ramet.srt.errors import RequestError, ServiceError, one_line
from ramet.srt.observability.progress import Progress
from ramet.srt.server_args import ServerArgs
from ramet.srt.weights.pool import recipe_of

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Became:
    """What has come of a change."""

    model: str | None  # its name in the API; None: it is a standby
    was: str | None  # what it was before
    way: str  # "new", "kept" (its processes, graphs and tokenizer were there), "same" (nothing had to be done)
    weights: Weights
    version: str | None
    phases: dict[str, float]  # name -> seconds from the request to its end


class Standby:
    """Its life begins with `open` on the event loop.

    Args:
        template: what all of its models have in common.
        num_kept: lives that are kept when they are put down, to be woken.
        shapes: paths of models whose shapes are prepared, and kept beside those.
        on_death: called with one line when what serves has ended by itself.
        on_change: called when nothing serves any more: whoever is connected must not take the next model for this one.
    """

    def __init__(
        self,
        template: ServerArgs,
        launch_time: float,
        num_kept: int,
        shapes: Sequence[str],
        scheduler_module: str,
        on_death: Callable[[str], None],
        on_change: Callable[[], None],
    ):
        self.template = template
        self.metrics = StandbyMetrics(self)
        self.serving: Life | None = None
        self.kept: dict[str, Life] = {}  # by the key of their shape; the last put down is the last
        self.becoming: str | None = None  # in words, while it changes
        self.warm_after_s: float | None = None  # from the launch, when it could become a model first
        self.spares: Spares
        self._launch_time = launch_time
        self._shapes = shapes
        self._num_kept = num_kept + len(shapes)
        self._scheduler_module = scheduler_module
        self._report_death = on_death
        self._on_change = on_change
        self._turn = asyncio.Lock()
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="starter")
        self._give_up = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    def open(self) -> None:
        """Begin to warm up, on the running event loop."""
        self.spares = Spares(self._new_life)

    def _new_life(self) -> Life:
        return Life(self.template, time.time(), self._scheduler_module, self._starter, self._on_life_death)

    async def wait_warm(self) -> None:
        """Wait until it can become a model, and has prepared shapes.

        Raises:
            LaunchError, OSError, RequestError, ServiceError: if it can't.
        """
        await self.spares.wait()
        async with self._turn:
            for path in self._shapes:
                await self._prepare(path)
        self.warm_after_s = time.time() - self._launch_time

    async def _prepare(self, path: str) -> None:
        self.becoming = f"this instance prepares {path}"
        try:
            args, progress = server_args_of(shape_of(path), self.template), Progress(time.time())
            await _in_thread(read_model, args)
            life = await self.spares.take()
            try:
                await life.prepare(args, progress, self._give_up)
            except BaseException:
                await life.end()
                raise
            life.instance.metrics.registry.register(self.metrics)
            self.kept[life.key] = life
            self.spares.replace()
            await self.spares.wait()
        finally:
            self.becoming = None

    @property
    def is_standby(self) -> bool:
        """Whether it could become a model now."""
        return self.serving is None and self.becoming is None and self.spares.is_warm

    @property
    def num_kept(self) -> int:
        """Models that it has put down and keeps."""
        return len(self.kept)

    @property
    def state(self) -> str:
        """In a word."""
        if self.becoming is not None:
            return "becoming"
        return "standby" if self.serving is None else "serving"

    @property
    def refusal(self) -> str | None:
        """Why no request of a user is answered now; None while a model serves."""
        if self.becoming is not None:
            return self.becoming
        return None if self.serving is not None else "this instance is a standby: it has no model yet (/become)"

    # -- Changes

    async def become(self, body: BecomeBody) -> Became:
        """Serve another model, or none.

        Raises:
            RequestError: if it can't be done: all is as it was then.
            ServiceError: if no processes can be had, or it is about to end.
        """
        if self._turn.locked():
            raise RequestError(f"{self.becoming or 'it changes'}: one change at a time", status_code=409)
        return await self._shielded(self._become(body))

    async def _shielded(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Who has asked may go away: a change is brought to its end all the same."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _become(self, body: BecomeBody) -> Became:
        async with self._turn:
            progress, before = Progress(time.time()), self.serving
            try:
                became = await self._change(body, progress)
            except (RequestError, ServiceError) as error:
                self.metrics.observe_failure()
                logger.warning("it does not become %s: %s", body.model_path, error)
                raise
            finally:
                self.becoming = None
                if before is not None and before.death is not None:
                    await before.end()
            seconds = became.phases["ready"]
            self.metrics.observe(became.way, seconds)
            logger.info("%s instead of %s after %.3f s (%s)", became.model or "a standby", became.was or "a standby",
                        seconds, became.way)  # fmt: skip
            return became

    async def _change(self, body: BecomeBody, progress: Progress) -> Became:
        before = self.serving
        was = None if before is None else before.args.model_name
        if self._give_up.is_set():
            raise ServiceError("the standby is about to end")
        if body.model_path is None:
            body.check_nothing_else()
            if before is not None:
                self.becoming = "this instance becomes a standby"
                await self._put_down(before, body, progress)
                self._keep(before)
            return self._became(None, was, "same" if before is None else "kept", Weights("", 0), progress)
        args = server_args_of(body, self.template)
        key = shape_key(args)
        if before is not None and before.key != key and body.from_standby:
            raise RequestError(f"this instance is no standby: it serves {was}", param="from_standby", status_code=409)
        if before is not None and before.key == key and not self._asks_for_more(body, before):
            return self._became(before, was, "same", Weights("", 0), progress)
        if before is not None and before.key == key:  # an update is all that it takes, while it serves
            return self._became(before, was, "kept", await before.wake(body, args, progress), progress)
        await _in_thread(read_model, args)
        kept = self.kept.get(key)
        spare = None if kept is not None else await self.spares.take()
        progress.mark("checked")
        self.becoming = f"this instance becomes {args.model_name}"
        if before is not None:
            try:
                await self._put_down(before, body, progress)
            except BaseException:
                if spare is not None:
                    self.spares.give_back(spare)
                raise
        life, way, weights = await self._serve(body, args, progress, kept, spare, before)
        life.recipe = recipe_of(
            body.model_dump(exclude_none=True, exclude={"requests", "seed", "source", "from_standby"})
        )
        self.serving = life
        self.kept.pop(key, None)
        for other in (before, kept):
            if other is not None and other is not life:
                self._keep(other)
        return self._became(life, was, way, weights, progress)

    def _asks_for_more(self, body: BecomeBody, life: Life) -> bool:
        """Whether a model that serves already is asked for with certain weights, which must be looked at."""
        version = body.weight_version
        has_other = version is not None and version != life.instance.manager.weight_version
        is_asleep = life.instance.sleep.is_asleep
        return has_other or is_asleep or body.weights_digest is not None or body.way in ("instance", "files")

    def _became(self, life: Life | None, was: str | None, way: str, weights: Weights, progress: Progress) -> Became:
        progress.mark("ready")
        name = None if life is None else life.args.model_name
        version = None if life is None else life.instance.manager.weight_version
        return Became(name, was, way, weights, version, progress.phases)

    async def _put_down(self, life: Life, body: BecomeBody, progress: Progress) -> None:
        """From here on nothing serves."""
        self.serving = None
        try:
            await life.put_down(drains=body.drains)
        except (RequestError, ServiceError):
            if life.death is None:
                self.serving = life
                raise
            logger.error("what served has ended while it was put down: %s", life.death)
        self._on_change()
        progress.mark("put down")

    async def _serve(
        self,
        body: BecomeBody,
        args: ServerArgs,
        progress: Progress,
        kept: Life | None,
        spare: Life | None,
        before: Life | None,
    ) -> tuple[Life, str, Weights]:
        """Have a model serve while nothing does; if that fails, what served before does again."""
        try:
            if kept is not None:
                try:
                    return kept, "kept", await kept.wake(body, args, progress)
                except (RequestError, ServiceError) as error:
                    logger.warning("%s, which was kept, can't be woken and is built anew: %s", args.model_name, error)
            life = spare or await self.spares.take()
            try:
                weights = await life.start(args, progress, self._give_up)
            except BaseException:
                self._in_background(life.end())
                raise
            finally:
                self.spares.replace()
            life.instance.metrics.registry.register(self.metrics)
            return life, "new", weights
        except Exception as error:
            await self._restore(before, error)
            raise

    async def _restore(self, before: Life | None, error: BaseException) -> None:
        if before is None or before.death is not None:
            return
        try:
            await before.wake_as_it_was()
        except (RequestError, ServiceError) as second:
            logger.error("what served before can't be had again: %s", second)
            await before.end()
            raise RequestError(
                f"{error}; what served before can't be had again, so it is a standby: {second}"
            ) from None
        self.serving = before

    def _keep(self, life: Life) -> None:
        """Keep what was put down unless its shape serves, and end those that were kept longest if there are many."""
        if life.death is not None or (self.serving is not None and self.serving.key == life.key):
            self._in_background(life.end())
            return
        self.kept[life.key] = life
        while len(self.kept) > self._num_kept:
            self._in_background(self.kept.pop(next(iter(self.kept))).end())

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- Deaths and the end

    def _on_life_death(self, life: Life) -> None:
        """A process has ended by itself."""
        line = life.death
        if life is self.serving:
            self._report_death(str(line))
            return
        for key, kept in list(self.kept.items()):
            if kept is life:
                logger.error("%s, which was kept, has ended: %s", life.args.model_name, line)
                del self.kept[key]
                self._in_background(life.end())
        if self.spares.note_death(life):
            self._in_background(life.end())

    def fail_requests(self) -> None:
        """Give up every request that still runs: it gets an error."""
        if self.serving is not None:
            self.serving.instance.fail_requests()

    async def drain(self) -> None:
        """Have what serves end its requests."""
        self._give_up.set()
        if self.serving is not None and self.serving.death is None:
            await self.serving.instance.drain()

    async def close(self) -> None:
        """End every life."""
        self._give_up.set()
        if self._tasks:
            await asyncio.wait(self._tasks)
        lives = [*self.kept.values(), *([] if self.serving is None else [self.serving])]
        await asyncio.gather(self.spares.close(), *(life.end() for life in lives))
        self._starter.shutdown(wait=False)


async def _in_thread(work: Callable[..., Result], *arguments: Any) -> Result:
    try:
        return await asyncio.to_thread(work, *arguments)
    except RequestError:
        raise
    except (ValueError, OSError) as error:
        raise RequestError(one_line(error)) from None
