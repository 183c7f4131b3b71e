"""Owns the processes that chat templates run in: bounded in time and memory, ended and replaced when one is beyond it.

A template can multiply strings, nest loops and build structures that refer to themselves a million times; no check of
single operations finds every way. What a process may take the kernel bounds. Nothing of Jinja is imported here.
"""

import atexit
import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from typing import Any

from ramet.srt.errors import ServiceError
from ramet.srt.utils.python_path import child_python_path

CPU_S = 2.0  # of one rendering; the usual one takes a few thousandths of a second
WALL_S = 30.0  # the same where other processes take the processor
START_S = 60.0
MEMORY_BYTES = 512 << 20  # beyond what an idle process has
MAX_TEXT_BYTES = 64 << 20  # of a prompt as JSON
SMALL_BYTES = 64 << 10  # a chat beyond it waits for another process than small ones
NUM_SMALL, NUM_LARGE = 2, 1
MAX_TEMPLATES = 64  # that one process has seen
MODULE = "ramet.srt.text.template_worker"
ENDING = "the processes for chat templates are ending"


class TemplateFailed(Exception):  # noqa: N818 - what it says goes behind "the chat template"
    """The template could not be rendered; `line` is that of a syntax error."""

    def __init__(self, message: str, line: int | None = None):
        super().__init__(message)
        self.line = line


def render_template(source: str, values: dict[str, Any] | None, continue_final_message: bool = False) -> str:
    """The text that template `source` gives for `values`; "" after compiling alone, for None. Blocks.

    Raises:
        TemplateFailed: that says why there is no text.
        ServiceError: if no process can be started.
    """
    request = json.dumps({"values": values, "continue": continue_final_message}, default=_placeholder).encode()
    pool = _small if len(request) <= SMALL_BYTES else _large
    return pool.render(source, request)


def _placeholder(value: Any) -> str:
    return f"<{type(value).__name__}>"


class _Process:
    """One process, started when it is first needed. Not for several threads at once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._known: dict[str, int] = {}  # templates that the process has

    def render(self, source: str, request: bytes) -> str:
        has_ended = self._process is not None and self._process.poll() is not None
        if has_ended or len(self._known) >= MAX_TEMPLATES:
            self.end()
        channel = self._socket or self._start()
        number = self._known.get(source)
        head = json.dumps({"template": len(self._known) if number is None else number,
                           "source": source if number is None else None}).encode()  # fmt: skip
        try:
            reply = self._ask(channel, head + b"\n" + request + b"\n", WALL_S)
        except TimeoutError:
            self.end()
            raise TemplateFailed(f"has not ended after {WALL_S:g} s") from None
        except OSError:
            if self._socket is not channel:
                raise ServiceError(ENDING) from None
            self.end()
            raise TemplateFailed(f"took more than {CPU_S:g} s or {MEMORY_BYTES >> 20} MiB") from None
        self._known.setdefault(source, len(self._known))
        if reply.get("is_last"):
            self.end()
        if "text" in reply:
            return str(reply["text"])
        raise TemplateFailed(str(reply["error"]), reply.get("line"))

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        limits = (CPU_S, MEMORY_BYTES, MAX_TEXT_BYTES)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno()), *map(str, limits)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": child_python_path()},
                process_group=0,  # a Ctrl-C in the terminal is for the main process
            )
            theirs.close()
            self._socket = ours
            self._ask(ours, b"", START_S)
        except OSError as error:
            theirs.close()
            ours.close()
            self.end()
            raise ServiceError(f"the process for chat templates can't be started: {error}") from None
        return ours

    def _ask(self, channel: socket.socket, message: bytes, timeout_s: float) -> dict[str, Any]:
        """Send a message, and receive a line.

        Raises:
            OSError: if the process ends; TimeoutError, which is one, if it is too slow.
        """
        deadline = time.monotonic() + timeout_s
        channel.settimeout(timeout_s)
        channel.sendall(message)
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            channel.settimeout(max(0.001, deadline - time.monotonic()))
            part = channel.recv(1 << 20)
            if not part:
                raise ConnectionError("it ended without an answer")
            parts.append(part)
        reply: dict[str, Any] = json.loads(b"".join(parts))
        return reply

    def end(self) -> None:
        """End the process, if there is one; the next rendering starts another."""
        process, channel = self._process, self._socket
        self._process, self._socket, self._known = None, None, {}
        if channel is not None:
            channel.close()
        if process is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)


class _Pool:
    """Up to `size` processes. Whoever comes when all are busy waits, and who has waited longest is next."""

    def __init__(self, size: int) -> None:
        self._processes = [_Process() for _ in range(size)]
        self._lock = threading.Lock()
        self._idle = list(self._processes)
        self._waiting: deque[queue.SimpleQueue[_Process]] = deque()  # there are no idle processes while any wait
        self._num_ends = 0

    def render(self, source: str, request: bytes) -> str:
        num_ends = self._num_ends
        process = self._take()
        try:
            if self._num_ends != num_ends:
                raise ServiceError(ENDING)
            return process.render(source, request)
        finally:
            self._give_back(process)

    def _take(self) -> _Process:
        turn: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        with self._lock:
            if self._idle:
                return self._idle.pop()
            self._waiting.append(turn)
        return turn.get()

    def _give_back(self, process: _Process) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().put(process)
            else:
                self._idle.append(process)

    def end(self) -> None:
        """End the processes; whoever waits for one waits no longer."""
        self._num_ends += 1
        for process in self._processes:
            process.end()


_small, _large = _Pool(NUM_SMALL), _Pool(NUM_LARGE)


@atexit.register
def end_template_processes() -> None:
    """End those that there are; a later rendering starts new ones."""
    _small.end()
    _large.end()
