"""Owns the serving of a standby over HTTP from its start to its end: signals, drain, the exit code."""

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence

from ramet.srt.entrypoints.child_processes import LaunchError
from ramet.srt.entrypoints.http_server import SIGNALS, SignalFreeServer, make_runner, make_server
from ramet.srt.entrypoints.listener import shares
from ramet.srt.entrypoints.standby.host_record import HostRecord, RecordFile
from ramet.srt.entrypoints.standby.pool_member import PoolMember
from ramet.srt.entrypoints.standby.standby import Standby
from ramet.srt.entrypoints.standby.standby_app import StandbyApp
from ramet.srt.errors import ServiceError, one_line
from ramet.srt.server_args import ServerArgs
from ramet.srt.text.template_process import end_template_processes

logger = logging.getLogger(__name__)


def serve_standby(
    template: ServerArgs,
    num_kept: int,
    shapes: Sequence[str],
    launch_time: float,
    scheduler_module: str,
    listener: socket.socket,
    check_signals: Callable[[], None],
) -> None:
    """Be a standby on `listener` until SIGTERM or SIGINT; a second signal ends the process at once.

    Args:
        check_signals: called once signals are taken here; raises if one has come before.

    Raises:
        LaunchError: if it can't start, or what serves has ended because a process of it has.
    """
    with make_runner() as runner:
        server = StandbyServer(template, num_kept, shapes, launch_time, scheduler_module, listener)
        runner.run(server.run(check_signals))


class StandbyServer:
    """One run of the HTTP server and the standby behind it."""

    def __init__(
        self,
        template: ServerArgs,
        num_kept: int,
        shapes: Sequence[str],
        launch_time: float,
        scheduler_module: str,
        listener: socket.socket,
    ):
        self._listener = listener
        self._template = template
        self._end: asyncio.Event
        self._server: SignalFreeServer
        self._death: str | None = None
        self._standby = Standby(
            template, launch_time, num_kept, shapes, scheduler_module, self._on_death, self._close_connections
        )
        self._app = StandbyApp(self._standby)

    def _close_connections(self) -> None:
        """Those that are idle now, and the others with their answers."""
        for connection in list(self._server.server_state.connections):
            connection.shutdown()

    def _on_death(self, line: str) -> None:
        self._death = self._death or line
        self._end.set()

    async def run(self, check_signals: Callable[[], None]) -> None:
        """Serve until the end. Raises what `serve_standby` raises."""
        self._end = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        check_signals()
        standby = self._standby
        standby.open()
        server = self._server = make_server(self._app, self._template)
        serving = asyncio.create_task(server.serve(sockets=shares(self._listener)))
        serving.add_done_callback(lambda _task: self._end.set())
        reporting: asyncio.Task[None] | None = None
        record: RecordFile | None = None
        try:
            if self._template.modelexpress is not None:
                reporting = asyncio.create_task(PoolMember(standby, time.time()).run())
            await self._warm_up()
            record = self._leave_record()
            await self._end.wait()
            if self._death is None:
                await standby.drain()
        finally:
            if record is not None:
                record.close()
            if reporting is not None:
                reporting.cancel()
            standby.fail_requests()
            server.should_exit = True
            await serving
            self._app.own.flush_log()
            end_template_processes()  # Python would wait for the threads that wait for these
            await standby.close()
        if self._death is not None:
            raise LaunchError(self._death)

    def _leave_record(self) -> RecordFile | None:
        """Let `ramet serve --from-standby` of this user on this host find it."""
        try:
            return RecordFile(HostRecord(url=self._template.url(), device=self._template.device))
        except OSError as error:
            logger.warning("this host's starts won't find this standby: %s", one_line(error))
            return None

    async def _warm_up(self) -> None:
        """Return when it could become a model, or the end has come."""
        warming = asyncio.create_task(self._standby.wait_warm())
        ending = asyncio.create_task(self._end.wait())
        await asyncio.wait((warming, ending), return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if not warming.done():
            warming.cancel()
            return
        try:
            await warming
        except (LaunchError, OSError, ValueError, ServiceError) as error:
            raise LaunchError(one_line(error)) from None
        logger.info("standby on %s %.2f s after the launch", self._template.url(), self._standby.warm_after_s)
        gc.freeze()  # what there is now stays: the collector need not keep requests waiting to look through it

    def _on_signal(self, name: str) -> None:
        if self._end.is_set():
            logger.warning("%s again: ending at once", name)
            logging.shutdown()
            os._exit(1)  # the children die with the thread that has started them
        logger.info("%s: running requests may end within %g s", name, self._template.drain_timeout)
        self._end.set()
