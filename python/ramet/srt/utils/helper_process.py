"""Owns Python processes that keep native code apart from the process that needs it: their start, and what ends them."""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys

import ramet

# As `multiprocessing` does it: the child finds what its parent finds, and no site's files are read again.
BOOT = """
import json, runpy, sys
sys.path[:] = json.loads(sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), None, "__main__")
"""
PR_SET_NAME = 15
F_SETSIG = 10  # linux/fcntl.h


def start_python(
    module: str, fd: int, *, sees_gpus: bool, stderr: int | None = None, **environment: str
) -> "subprocess.Popen[bytes]":
    """Run a module of this package, which calls `begin_helper` first, in a process that ends with this one.

    Args:
        fd: its end of a socket, which is its first argument.
        stderr: a descriptor; None: this process's own.
        environment: variables that it has besides.
    """
    hidden = {} if sees_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    root = os.path.dirname(next(iter(ramet.__path__)))
    arguments = ["-I", "-S", "-c", BOOT, json.dumps([root, *sys.path]), module, str(fd)]
    return subprocess.Popen(
        [sys.executable, *arguments],
        pass_fds=[fd],
        env=os.environ | hidden | environment,
        stdin=subprocess.PIPE,  # nothing is written: that it is closed, by our end too, ends the process
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )


def describe_end(code: int) -> str:
    """What became of a process that ended with `code`."""
    if code >= 0:
        return f"ended with code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def begin_helper(name: bytes) -> None:
    """In the process itself: leave its end to the one that has started it.

    Args:
        name: as process lists show it, up to 15 bytes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # both reach the whole group; the pipe's end is what counts
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_with_pipe(sys.stdin.fileno())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would be as large as the weights
    ctypes.CDLL(None).prctl(PR_SET_NAME, name, 0, 0, 0)


def _end_with_pipe(fd: int) -> None:
    """Have the kernel kill this process when the other end of a pipe is closed, whatever native code hangs in it.

    Not when the thread ends that has started it, as PR_SET_PDEATHSIG would.
    """
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
