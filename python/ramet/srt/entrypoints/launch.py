"""Owns the life of a server's main process: from its flags to its exit code.

What can be wrong is found first, then the children are started, and only then the heavy imports begin.
"""

import contextlib
import dataclasses
import logging
import resource
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from ramet.srt.command_line import read_command_line
from ramet.srt.entrypoints.child_processes import SCHEDULER_MODULE, LaunchError
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.listener import bind
from ramet.srt.entrypoints.traces import trace_failed_start
from ramet.srt.errors import limit_advice, one_line
from ramet.srt.observability.logs import configure_logging
from ramet.srt.observability.progress import process_start_time
from ramet.srt.observability.progress_bar import allow_bars
from ramet.srt.observability.traces import start_traces, stop_traces, tracer
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.file_limit import raise_file_limit
from ramet.srt.utils.imports import importing

logger = logging.getLogger(__name__)


MIN_FILES = 64  # open at a time, in the main process of an instance that nobody has connected to


class Interrupted(BaseException):
    """A signal has come before there was a server to take it."""


def serve_from_command_line(argv: Sequence[str], prog: str) -> int:
    """Serve as the flags say; the exit code."""
    launch_time = process_start_time()
    try:
        server_args, notes = read_command_line(argv, prog)
    except ValueError as error:
        return fail(error)
    configure_logging(server_args.log_level, "server", server_args.log_format)
    for note in notes:
        logger.info("%s", note)
    return launch(server_args, launch_time)


def launch(server_args: ServerArgs, launch_time: float, scheduler_module: str = SCHEDULER_MODULE) -> int:
    """Serve until SIGTERM, SIGINT or the death of a child.

    Returns:
        The exit code: 0 after a signal; 1, with one line on stderr, if the start failed or a child has died.
    """
    configure_logging(server_args.log_level, "server", server_args.log_format)
    if server_args.otlp_traces_endpoint is not None:
        try:
            start_traces(server_args.otlp_traces_endpoint, {"ramet.model": server_args.model_name})
        except ValueError as error:
            return fail(error)
    allow_bars(server_args.log_format == "text")
    raise_file_limit()
    try:
        with StartSignals() as signals:
            return _run(server_args, launch_time, scheduler_module, signals)
    except Interrupted:
        return 0
    finally:
        stop_traces()


def _run(server_args: ServerArgs, launch_time: float, scheduler_module: str, signals: "StartSignals") -> int:
    instance: Instance | None = None
    try:
        check_file_limit()
        with contextlib.closing(bind(server_args.host, server_args.port)) as listener:
            server_args = dataclasses.replace(server_args, port=listener.getsockname()[1])
            logger.info("starting; users will be served on %s", server_args.url())
            instance = Instance(server_args, launch_time, scheduler_module)
            instance.start()
            with importing("fastapi"):
                from ramet.srt.entrypoints.http_server import serve  # heavy: the scheduler imports torch meanwhile

            signals.check()
            serve(instance, listener, signals.check)
    except (ValueError, LaunchError) as error:
        if (own := tracer()) is not None and (instance is None or not instance.schedulers):
            trace_failed_start(own, launch_time, one_line(error))
        return fail(error)
    except (OSError, MemoryError, RuntimeError) as error:
        if limit_advice(error) is None:
            raise
        return fail(error)
    finally:
        if instance is not None:
            with StartSignals():  # once more: an event loop that ends leaves Python's own handlers behind
                try:
                    instance.stop_processes()
                except Interrupted:
                    instance.kill_processes()
                    raise
    return 0


def check_file_limit() -> None:
    """Refuse a limit at which libraries end the process without a word that helps. Raises ValueError."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit < MIN_FILES:
        raise ValueError(
            f"ulimit -n allows a process {limit} files; an instance needs {MIN_FILES}, and one per connection"
        )


class StartSignals:
    """Until a server takes the signals, they end the start in an orderly way."""

    def __init__(self) -> None:
        self._has_come = False
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raise Interrupted if a signal has come. What it raised then may have met code that drops all exceptions."""
        if self._has_come:
            raise Interrupted

    def __enter__(self) -> "StartSignals":
        self._before = {number: signal.signal(number, self._interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self._has_come = True
        raise Interrupted


def fail(error: Exception) -> int:
    """One line for the user, whatever the error's text looks like; the exit code."""
    print("ramet: error:", one_line(error), file=sys.stderr, flush=True)
    return 1
