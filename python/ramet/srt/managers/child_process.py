"""Owns the child's side of a start: its configuration from stdin, its one status message, and its end with the parent.

A spare child is given two configurations: with the first it does all that needs no model, and the second, whenever that
comes, is of the instance that it is to be a part of.

The parent's side is entrypoints/child_processes.py.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import msgspec

from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.managers.port_args import PortArgs
from ramet.srt.server_args import ServerArgs

PR_SET_PDEATHSIG = 1  # linux/prctl.h
WARM = b"\n"  # what a spare reports before its one message: nothing but a model is missing


class ChildConfig(msgspec.Struct, kw_only=True):
    """What a child process gets as one JSON line on its stdin."""

    server_args: dict[str, Any]
    port_args: PortArgs
    directory: str  # for Unix sockets; only this user may enter it
    parallel: ParallelConfig
    bootstrap_url: str | None  # of the engine-info bootstrap server, when the instance has one
    launch_time: float  # unix seconds: when the instance was started
    parent_pid: int
    board_fd: int  # of the page on which the node's processes beat, see managers/pulse.py
    slot: int  # of this process on it
    exchange_fd: int = -1  # of the memory over which the node's ranks add up, where there are several
    is_spare: bool = False  # its model is in a second configuration, which is yet to come

    def make_server_args(self) -> ServerArgs:
        return ServerArgs(**self.server_args)


def status_fd_argument(argv: Sequence[str]) -> int:
    """The descriptor in `--status-fd N`.

    Raises:
        ValueError: if that is not what the arguments are.
    """
    if len(argv) != 2 or argv[0] != "--status-fd" or not argv[1].isdigit():
        raise ValueError("this module is started by ramet itself, with --status-fd N and a configuration on stdin")
    return int(argv[1])


def read_child_config(stream: TextIO = sys.stdin) -> ChildConfig:
    """The configuration that the parent writes.

    Raises:
        ValueError: if there is none: the parent has died, or somebody else started this process.
    """
    line = stream.readline()
    if not line:
        raise ValueError("there is no configuration on stdin: the launcher has gone")
    return msgspec.json.decode(line, type=ChildConfig)


def take_orders(status_fd: int) -> ChildConfig:
    """For a spare that is warm: report that, and wait for the configuration with its model, for as long as it takes.

    Raises:
        ValueError: if there will be none: the parent has died.
    """
    os.write(status_fd, WARM)
    return read_child_config()


def die_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process the signal when the thread that started it ends; at once if it already has."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal_number)


def send_status(status_fd: int, message: bytes) -> None:
    """Send the one start-up message, an encoded SchedulerReady, SchedulerFailed or such, and close the pipe.

    Where the instance ends already, as another rank has failed first, nobody reads it: that is no error.
    """
    with contextlib.suppress(BrokenPipeError), os.fdopen(status_fd, "wb") as pipe:
        pipe.write(message)
