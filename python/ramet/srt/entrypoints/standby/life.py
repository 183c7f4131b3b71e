"""Owns one life of a standby: an instance with the application that serves it, from its spare processes to its end.

A life begins without a model. It is given one, may fall asleep and be woken with the same weights or others of the same
shape, and ends.
"""

import asyncio
import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from ramet.srt.entrypoints.child_processes import LaunchError
from ramet.srt.entrypoints.http.body_check import BodyChecker
from ramet.srt.entrypoints.http_api import create_app
from ramet.srt.entrypoints.instance import ABORT_TIMEOUT_S, Instance
from ramet.srt.entrypoints.standby.orders import BecomeBody, shape_key
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.managers.update_roles import FoundSource
from ramet.srt.managers.weight_sources import find_files, find_instance, find_listed
from ramet.srt.observability.progress import Progress
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.net import reachable_host
from ramet.srt.weights.memory_messages import MEMORY_TAGS
from ramet.srt.weights.version import DEFAULT_VERSION

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """How they came."""

    source: str
    num_bytes: int


class Life:
    """One instance of a standby.

    Args:
        template: the flags that all models of the standby have in common.
        starter: its one thread lives as long as the process, and so do the children that it starts.
        on_death: called on the event loop when a process of the life has ended by itself.
    """

    def __init__(
        self,
        template: ServerArgs,
        launch_time: float,
        scheduler_module: str,
        starter: Executor,
        on_death: "Callable[[Life], None]",
    ):
        self.instance = Instance(template, launch_time, scheduler_module)
        self.checker = BodyChecker(0)
        self.key = ""  # of the shape that it has
        self.recipe = ""  # by which it has become what it is: a body of /become as JSON
        self.is_over = False
        self._is_made_up = False  # it has a shape, and no weights have ever come
        self._starter = starter
        self._loop = asyncio.get_running_loop()
        self._on_death = on_death
        self._spare_death: str | None = None
        self._is_open = False

    @property
    def death(self) -> str | None:
        """The one line about the process whose end has ended it; None while it lives."""
        return self.instance.death or self._spare_death

    @property
    def args(self) -> ServerArgs:
        return self.instance.server_args

    async def _in_starter(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await self._loop.run_in_executor(self._starter, functools.partial(work, *arguments))

    # -- Without a model

    async def warm_up(self) -> None:
        """Start everything that needs no model. Raises LaunchError if that can't be done."""
        await self._in_starter(self._warm_up)

    def _warm_up(self) -> None:
        self.instance.warm_up()
        importlib.import_module("ramet.srt.utils.http_client")  # by which seeds are asked
        if self.args.modelexpress is not None:
            importlib.import_module("ramet.srt.modelexpress.client.client")
        self.app = create_app(self.instance, self.checker)
        self.instance.wait_warm(self._tell_spare_death)

    def _tell_spare_death(self, line: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._note_spare_death, line)

    def _note_spare_death(self, line: str) -> None:
        if not self._is_open and not self.is_over:
            self._spare_death = line
            self._on_death(self)

    # -- With a model

    async def start(self, args: ServerArgs, progress: Progress, give_up: asyncio.Event) -> Weights:
        """Serve a model that it has not served before.

        Raises:
            RequestError: if it can't be served; the message says why.
        """
        instance = self.instance
        try:
            await self._in_starter(instance.take, args, progress.launch_time)
            await self._in_starter(instance.start)
            self.checker.vocab_size = instance.model_config.vocab_size
            self._is_open = True
            instance.open(on_death=lambda _line: self._on_death(self))
            if not await instance.wait_ready(give_up):
                raise ServiceError("the standby is about to end")
        except (ValueError, LaunchError, OSError, MemoryError) as error:
            raise RequestError(str(error)) from None
        if instance.death is not None:
            raise RequestError(instance.death)
        self.key = shape_key(args)
        for phase, seconds in instance.progress.phases.items():
            progress.phases[phase] = seconds
        reports = [scheduler.load_report for scheduler in instance.schedulers]
        return Weights(", ".join(sorted({one.source for one in reports})), sum(one.num_bytes for one in reports))

    async def prepare(self, args: ServerArgs, progress: Progress, give_up: asyncio.Event) -> None:
        """Have the shape of a model, put down: all but its weights, in whose place others were made up.

        Raises:
            RequestError, ServiceError: as `start`.
        """
        await self.start(replace(args, checkpoint_engine_wait_weights_before_ready=True), progress, give_up)
        self._is_made_up = True
        await self.instance.sleep.release(MEMORY_TAGS, "abort", keeps_copy=False, made_up=True)

    async def put_down(self, *, drains: bool) -> None:
        """Have requests end, and give back the memory of the weights and the KV cache. No more requests may come.

        Raises:
            RequestError, ServiceError: if it can't be done: it serves on then.
        """
        instance, manager = self.instance, self.instance.manager
        if instance.sleep.is_asleep or not drains:
            manager.abort_all()
        elif instance.pauses.is_paused:
            await instance.pauses.go_on()  # those that it holds can end
        if not await manager.drain(self.args.drain_timeout if drains else ABORT_TIMEOUT_S):
            logger.warning("%d sequences have not ended in time and are aborted", manager.num_running)
        await instance.profiles.end()
        await instance.sleep.release(MEMORY_TAGS, "abort", keeps_copy=False)
        if not await manager.drain(ABORT_TIMEOUT_S):
            logger.warning("%d sequences are aborted and have not ended", manager.num_running)

    async def wake_as_it_was(self) -> None:
        """Serve what it served when it was put down. Raises RequestError or ServiceError if that can't be had."""
        await self.instance.sleep.resume(None)

    async def wake(self, body: BecomeBody, args: ServerArgs, progress: Progress) -> Weights:
        """Serve weights of its shape from where the body says.

        Raises:
            RequestError, ServiceError: if it can't: it is as it was before then, put down.
        """
        instance = self.instance
        find = self._finder(body, args)
        if find is None:
            if self._is_made_up:
                raise RequestError("its weights have no name yet")
            if body.way == "modelexpress" and not self._is_from_listed:
                raise RequestError("its weights were not those of an instance that is listed")
            moved = await instance.sleep.resume(None)
            return Weights(moved.source, moved.num_bytes)
        from_files = isinstance(find, functools.partial) and find.func is find_files
        version = body.weight_version or (DEFAULT_VERSION if from_files else None)  # as a start would call them
        report = await instance.sleep.update(find, version, abort_all=False, in_place=False)
        self._is_made_up = False
        progress.mark("weights")
        await instance.sleep.resume(None)
        return Weights(report.source, report.num_bytes)

    @property
    def _is_from_listed(self) -> bool:
        """Whether what it has, or had, came from where a metadata server says."""
        is_of_start = self.instance.weight_updates.current.number == 0
        return is_of_start and self.args.modelexpress is not None and self.args.takes_weights_from_instances

    def _finder(self, body: BecomeBody, args: ServerArgs) -> Callable[[], FoundSource] | None:
        """What finds the weights; None where those that it had are asked for by no name."""
        model = self.instance.model_config
        config = args.load_config(dtype=model.dtype, quantization=args.quantization or model.quantization)
        digest = args.weights_digest
        if body.seed is not None:
            return functools.partial(find_instance, config, body.seed, digest, keeps_name=True)
        if args.modelexpress is not None and not args.modelexpress.source:
            if body.weight_version is None:
                return None
            own = reachable_host(args.host), args.port
            return functools.partial(find_listed, config, None, body.weight_version, own, digest)
        return functools.partial(find_files, model, args.model_path, args.revision, digest)

    # -- The end

    async def end(self) -> None:
        """End its processes. Requests that still run get an error."""
        if self.is_over:
            return
        self.is_over = True
        instance = self.instance
        if self._is_open:
            instance.fail_requests()
            self.app.flush_log()
            await self.checker.close()
            await instance.close()
        await asyncio.to_thread(instance.stop_processes)
