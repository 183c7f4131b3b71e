"""Owns the scheduler's ends of its connections to the grammar processes: starting, talking and killing. Never waits."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator

import msgspec

from ramet.srt.managers.grammar_messages import (
    FORK,
    KILL,
    Answer,
    Close,
    Compile,
    FrameReader,
    Hello,
    NurseryConfig,
    Order,
    decode_answer,
    frame,
)
from ramet.srt.utils.python_path import child_python_path

NURSERY_MODULE = "ramet.srt.managers.grammar_process"
READ_BYTES = 1 << 20
NUM_SPARES = 4
MAX_REUSED_BYTES = 32 << 20
_CPUCLOCK_SCHED = 2  # linux/posix-timers.h: a process's clock has the id ~pid * 8 + 2


class NurseryLink:
    """The scheduler's end of the process from which those of the constraints are forked. Starts it.

    Raises:
        OSError: if it can't be started.
    """

    def __init__(self, config: NurseryConfig):
        self.has_forked = False  # one of its children has said hello
        self._spares: list[GrammarLink] = []  # to processes that wait for a constraint
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.socket.send(msgspec.json.encode(config))
            self.socket.setblocking(False)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", NURSERY_MODULE],
                stdin=theirs.fileno(),
                env={**os.environ, "PYTHONPATH": child_python_path()},
            )
        except OSError:
            self.socket.close()
            raise
        finally:
            theirs.close()

    def take(self) -> "GrammarLink":
        """A process for a constraint: one that was made ready, or else a new one. Raises OSError if there is none."""
        while self._spares:
            link = self._spares.pop(0)
            with contextlib.suppress(EOFError):
                for _ in link.read():
                    """It says hello, or has not done so yet."""
                return link
            link.close()
        return GrammarLink(self)

    def make_ready(self) -> None:
        """Have processes for the next constraints, as far as that can be now."""
        with contextlib.suppress(OSError):
            while len(self._spares) < NUM_SPARES:
                self._spares.append(GrammarLink(self))

    def fork(self, connection: socket.socket) -> None:
        """Have a process answer at `connection`. Raises OSError if it can't be told now."""
        socket.send_fds(self.socket, [FORK], [connection.fileno()])

    def kill(self, pid: int) -> None:
        """Have one of its processes killed. It knows whether the number is still that process's."""
        with contextlib.suppress(OSError):  # it is gone, and its children with it
            self.socket.send(KILL + str(pid).encode())

    def last_words(self) -> str:
        """Why it ended, as far as it says; an empty text while it lives."""
        try:
            return self.socket.recv(READ_BYTES).decode() or "the process ended"
        except BlockingIOError:
            return ""
        except OSError as error:
            return str(error)

    @property
    def is_ending(self) -> bool:
        """Whether it has ended, or some of its threads have: its children end before its socket is closed then."""
        try:
            with open(f"/proc/{self._process.pid}/stat", encoding="utf-8", errors="replace") as stream:
                return stream.read().rpartition(")")[2].split()[0] in ("X", "Z")
        except OSError:
            return True

    def close(self) -> None:
        """End it and its processes."""
        for link in self._spares:
            link.close()
        self._spares.clear()
        self.socket.close()
        self._process.kill()
        self._process.wait()


class GrammarLink:
    """The scheduler's end of one constraint's process.

    Raises:
        OSError: if there are no descriptors, or the nursery can't be told now.
    """

    def __init__(self, nursery: NurseryLink):
        self._nursery = nursery
        self.socket, theirs = socket.socketpair()
        try:
            self.socket.setblocking(False)
            nursery.fork(theirs)
        except OSError:
            self.socket.close()
            raise
        finally:
            theirs.close()
        self.awaited: deque[int] = deque()  # the sequences whose answers are to come, in order
        self.waiting_since = time.monotonic()  # for the first of them
        self.is_watched = False  # somebody waits for what it says
        self._niceness = 0
        self._pid = self._thread_id = 0  # 0: it has not said hello
        self._first_bytes = 0
        self._cpu_s = 0.0  # of the process, at its last answer
        self._reader = FrameReader()
        self._outbox = bytearray()

    @property
    def has_begun(self) -> bool:
        """Whether the process has said hello."""
        return self._pid != 0

    @property
    def is_reusable(self) -> bool:
        """Whether it has taken so little that another constraint can have it."""
        return self._niceness == 0 and self.memory_bytes() < MAX_REUSED_BYTES

    def send(self, order: Order) -> None:
        """Queue an order; `flush` sends it."""
        if not isinstance(order, Close | Compile):
            if not self.awaited:
                self.waiting_since = time.monotonic()
            self.awaited.append(order.sequence)
        self._outbox += frame(order)

    def flush(self) -> None:
        """Send what the process takes now."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):  # reading tells of its end
            while self._outbox:
                del self._outbox[: self.socket.send(self._outbox)]

    def read(self) -> Iterator[Answer]:
        """What the process has said.

        Raises:
            EOFError: if it has ended.
        """
        try:
            data = self.socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        for message in self._reader.push(data):
            answer = decode_answer(message)
            if isinstance(answer, Hello):
                self._pid, self._thread_id = answer.pid, answer.thread_id
                self._nursery.has_forked = True
                self._first_bytes = self._resident_bytes()
                self._renice()
            else:
                self.awaited.popleft()
                self.waiting_since, self._cpu_s = time.monotonic(), answer.total_cpu_s
            yield answer

    def cpu_s(self) -> float:
        """Seconds of computing since the last answer."""
        if not self._pid:
            return 0.0
        try:
            return time.clock_gettime((~self._pid << 3) | _CPUCLOCK_SCHED) - self._cpu_s
        except OSError:  # it has ended
            return 0.0

    def memory_bytes(self) -> int:
        """What it has taken since it said hello; what it shares with the nursery is not its own."""
        return max(0, self._resident_bytes() - self._first_bytes)

    def _resident_bytes(self) -> int:
        try:
            with open(f"/proc/{self._pid}/statm", encoding="ascii") as stream:
                _, resident, shared = stream.read().split()[:3]
        except (OSError, ValueError):
            return 0
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")

    def lower_priority(self, niceness: int) -> None:
        """Let it compute less when others want the core. There is no way back."""
        if niceness > self._niceness:
            self._niceness = niceness
            self._renice()

    def _renice(self) -> None:
        if self._niceness and self._thread_id:
            with contextlib.suppress(OSError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, self._thread_id, self._niceness)

    def close(self) -> None:
        """End the process, whatever it does."""
        if not self._pid:  # its hello is on the way, or else it finds that it can say none, and ends by itself
            with contextlib.suppress(OSError, EOFError):
                self.socket.shutdown(socket.SHUT_RD)
                for _ in self.read():
                    """Whose number is wanted."""
        self.socket.close()
        if self._pid:
            self._nursery.kill(self._pid)
