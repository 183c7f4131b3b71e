"""Owns the start of a server from the command line: `python -m ramet.launch_server --model-path … [flags]`.

What can be wrong is found first, then the children are started, and only then the heavy imports begin.
"""

import contextlib
import dataclasses
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from ramet.srt.command_line import parse_server_args
from ramet.srt.entrypoints.child_processes import SCHEDULER_MODULE, LaunchError
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.entrypoints.listener import bind
from ramet.srt.observability.logs import configure_logging
from ramet.srt.observability.progress import process_start_time
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.imports import importing

logger = logging.getLogger(__name__)


class Interrupted(BaseException):
    """A signal has come before there was a server to take it."""


def main(argv: Sequence[str] | None = None, prog: str = "ramet.launch_server") -> int:
    """Serve as the flags say; the exit code."""
    launch_time = process_start_time()
    try:
        server_args = parse_server_args(sys.argv[1:] if argv is None else argv, prog)
    except ValueError as error:
        return _fail(error)
    return launch(server_args, launch_time)


def launch(server_args: ServerArgs, launch_time: float, scheduler_module: str = SCHEDULER_MODULE) -> int:
    """Serve until SIGTERM, SIGINT or the death of a child.

    Returns:
        The exit code: 0 after a signal; 1, with one line on stderr, if the start failed or a child has died.
    """
    configure_logging(server_args.log_level, "server")
    instance: Instance | None = None
    with _signals_interrupt():
        try:
            with contextlib.closing(bind(server_args.host, server_args.port)) as listener:
                server_args = dataclasses.replace(server_args, port=listener.getsockname()[1])
                logger.info("listening on %s", server_args.url())
                instance = Instance(server_args, launch_time, scheduler_module)
                instance.start()
                with importing("fastapi"):
                    from ramet.srt.entrypoints.http_server import serve  # heavy: the scheduler imports torch meanwhile

                serve(instance, listener)
        except (ValueError, LaunchError) as error:
            return _fail(error)
        except Interrupted:
            return 0
        finally:
            if instance is not None:
                instance.stop_processes()
    return 0


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Until a server takes the signals, they end the start in an orderly way."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(error: Exception) -> int:
    """One line for the user, whatever the error's text looks like; the exit code."""
    print("ramet: error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
