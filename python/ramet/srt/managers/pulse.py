"""Owns the page of memory on which the processes of one node show each other that they move. It judges nobody.

The main process makes it and its children inherit it; nothing of it lies in a file system. Every process has a slot,
in which a thread of its own beats: it goes on through a long pass, whose computations don't hold Python's lock, and
stands still when the process is stopped, or when something holds that lock for good. What the process's main thread is
at stands beside it, so that work without an end can be seen too.
"""

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ramet.srt.distributed.words import Word

MAIN_SLOT = 0
WORD_NBYTES = 1024  # of text, its length before it
LENGTH = struct.Struct("=Q")
SLOT = struct.Struct("=QQQQ")  # beats; whether it serves; what its main thread is at; who is to end
BEATS, SERVES, TASK, END = range(4)
NUM_FIELDS = 4
OWN_WORD, HEARD_WORD = range(2)
LATE_PERIODS = 2.5  # without a beat, after which a process is late
HEADER_NBYTES = 2 * (LENGTH.size + WORD_NBYTES)


@dataclass(frozen=True)
class WatchLimits:
    """How long a process may stand still, in seconds: all are parts of --watchdog-timeout."""

    timeout_s: float

    @property
    def period_s(self) -> float:
        """Between two beats, and two looks at those of others."""
        return min(1.0, self.timeout_s / 20)

    @property
    def still_s(self) -> float:
        """Without a beat: what is left of the timeout is for the instance's end."""
        return self.timeout_s - min(0.4 * self.timeout_s, 10.0)

    @property
    def doubt_s(self) -> float:
        """Without a beat, after which /health says so."""
        return min(self.timeout_s / 4, 10.0)

    @property
    def long_task_s(self) -> float:
        """In one task, mostly a forward pass, after which /health says so; it may take all of the timeout."""
        return self.timeout_s / 2


class PulseBoard:
    """The page. A slot is written by its own process alone; whole numbers of 8 bytes don't tear.

    Args:
        fd: of the page, from the main process.
    """

    def __init__(self, fd: int):
        self.fd = fd
        self._page = mmap.mmap(fd, 0)
        self._numbers = memoryview(self._page)[HEADER_NBYTES:].cast("Q")

    @classmethod
    def create(cls, num_slots: int) -> "PulseBoard":
        """A new one, for the main process and its children. Its descriptor isn't inherited unless it is passed on."""
        fd = os.memfd_create("ramet-pulse")
        os.ftruncate(fd, HEADER_NBYTES + num_slots * SLOT.size)
        return cls(fd)

    def close(self) -> None:
        """Close the descriptor; threads that still beat go on doing so on the page."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def get(self, slot: int, field: int) -> int:
        return self._numbers[NUM_FIELDS * slot + field]

    def put(self, slot: int, field: int, value: int) -> None:
        self._numbers[NUM_FIELDS * slot + field] = value

    def word(self, which: int) -> Word | None:
        """OWN_WORD: what other nodes are to hear of this one. HEARD_WORD: what they say, or don't."""
        start = which * (LENGTH.size + WORD_NBYTES)
        (length,) = LENGTH.unpack_from(self._page, start)
        text = self._page[start + LENGTH.size : start + LENGTH.size + length]
        return Word.parse(text.decode(errors="replace"))

    def put_word(self, which: int, word: Word | None) -> None:
        start = which * (LENGTH.size + WORD_NBYTES)
        text = str(word or "").encode()[:WORD_NBYTES]
        LENGTH.pack_into(self._page, start, 0)  # a reader gets nothing rather than a mixture
        self._page[start + LENGTH.size : start + LENGTH.size + len(text)] = text
        LENGTH.pack_into(self._page, start, len(text))


class BoardVoice:
    """A NodeVoice: what nodes say passes over the board, where main processes put it and find it.

    Args:
        slot: of the process that speaks for its node.
    """

    def __init__(self, board: PulseBoard, slot: int):
        self._board = board
        self._slot = slot
        self._heard: Word | None = None

    def own_word(self) -> Word | None:
        return self._board.word(OWN_WORD)

    def hear(self, word: Word | None) -> None:
        if word != self._heard:
            self._heard = word
            self._board.put_word(HEARD_WORD, word)

    def is_told_to_end(self) -> bool:
        return self._board.get(MAIN_SLOT, END) > 0

    def hear_end(self, node: int) -> None:
        self._board.put(self._slot, END, node)


class LauncherBeats:
    """Whether the main process beats, for whoever asks now and then.

    Args:
        period_s: between two beats.
    """

    def __init__(self, board: PulseBoard, period_s: float):
        self._board = board
        self._late_s = LATE_PERIODS * period_s
        self._beats = -1
        self._changed_at = 0.0

    def move(self) -> bool:
        """Whether there has been a beat since the last time, or lately."""
        beats, now = self._board.get(MAIN_SLOT, BEATS), time.monotonic()
        if beats != self._beats:
            self._beats, self._changed_at = beats, now
        return now - self._changed_at < self._late_s


class Ticks:
    """A thread's own clock: it counts what it was awake for.

    A suspended host, a frozen container or a thread that got no processor is no one else's standstill: two looks are
    never further apart than two periods, whatever a clock says.
    """

    def __init__(self, period_s: float):
        self._period_s = period_s
        self._before = time.monotonic()
        self._stopping = threading.Event()

    def wait(self) -> float:
        """Wait for a period; the seconds that count since the last call, 0 after `stop`."""
        if self._stopping.wait(self._period_s):
            return 0.0
        now = time.monotonic()
        step_s, self._before = min(now - self._before, 2 * self._period_s), now
        return step_s

    def stop(self) -> None:
        self._stopping.set()


class Pulse:
    """The thread that beats in a child process, and looks at others each time.

    Args:
        look: called with the seconds since the last call: the child's look at the main process.
    """

    def __init__(self, board: PulseBoard, slot: int, period_s: float, look: Callable[[float], None]):
        self._board = board
        self._slot = slot
        self._look = look
        self._since: Callable[[], float | None] = _nothing
        self._ticks = Ticks(period_s)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> "Pulse":
        self._thread.start()
        return self

    def serve(self, task_since: Callable[[], float | None]) -> None:
        """The process has started, and its processor time is no sign of life any more: it has to beat.

        Args:
            task_since: time.monotonic() of the beginning of what the main thread is at; None while that may last.
        """
        self._since = task_since
        self._board.put(self._slot, SERVES, 1)

    def close(self) -> None:
        self._ticks.stop()

    def _run(self) -> None:
        beats = 0
        while True:
            beats += 1
            since = self._since()
            self._board.put(self._slot, TASK, 0 if since is None else int(since * 1e9) + 1)
            self._board.put(self._slot, BEATS, beats)
            step_s = self._ticks.wait()
            if step_s == 0.0:
                return
            self._look(step_s)


class Task:
    """What a main thread is at, for `Pulse.serve`. Costs a loop two assignments."""

    def __init__(self) -> None:
        self.since: float | None = None

    def begin(self) -> None:
        self.since = time.monotonic()

    def end(self) -> None:
        self.since = None


def _nothing() -> float | None:
    return None
