"""Owns how the nodes of an instance notice that one has gone, and tell each other whose process stands still.

Each node has one rank that beats. What it says of its node comes from a `NodeVoice`, which also hears of the others.
"""

import contextlib
import datetime
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from ramet.srt.distributed.words import PULSE_PERIOD_S, NodeVoice, Word

PULSE_TIMEOUT_S = 15.0
PULSE_DOUBT_S = 5.0  # of silence, after which the other nodes' /health says so
SUSPECT_TIMEOUT_S = 6.0  # instead of PULSE_TIMEOUT_S once an operation between ranks has broken off
SUSPECT_KEY = "suspect"
END_KEY = "asks-for-end"  # a node other than 0 that was told to end
STORE_TIMEOUT_S = 10.0
LONGEST_STEP_S = 3 * PULSE_PERIOD_S  # that counts between two looks: a pause of this process is nobody's silence


class NodePulse:
    """Tells the other nodes that this one lives, and watches them.

    Args:
        open_store: a connection of this thread's own, as a store's connection is not for several.
        title: names the process that beats.
        limit_s: --watchdog-timeout's part of how long a node may be silent.
        on_loss: called, in a thread, with a line that names the node that has gone or the process that hangs there.
        on_end: called, in a thread, when node 0 has ended the instance in good order.
    """

    def __init__(
        self,
        open_store: Callable[[float], dist.Store],
        node: int,
        nnodes: int,
        title: str,
        limit_s: float,
        voice: NodeVoice,
        on_loss: Callable[[str], None],
        on_end: Callable[[], None],
    ):
        self._open_store = open_store
        self._node = node
        self._title = title
        self._timeout_s = min(PULSE_TIMEOUT_S, limit_s)
        self._doubt_s = min(PULSE_DOUBT_S, limit_s / 3)
        self._voice = voice
        self._on_loss = on_loss
        self._on_end = on_end
        self._others = {other: _Other() for other in range(nnodes) if other != node}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()

    def _run(self) -> None:
        try:
            store = self._open_store(STORE_TIMEOUT_S)
            store.set_timeout(datetime.timedelta(seconds=STORE_TIMEOUT_S))
            store.set(f"pulse-of/{self._node}", self._title)
            count, before = 0, time.monotonic()
            while not self._closing.wait(PULSE_PERIOD_S):
                count += 1
                now = time.monotonic()
                step_s, before = min(now - before, LONGEST_STEP_S), now
                store.set(f"pulse/{self._node}", f"{count} {self._voice.own_word() or ''}")
                if store.check(["ended"]):
                    store.set(f"left/{self._node}", "")
                    self._on_end()
                    return
                self._pass_end_on(store)
                self._voice.hear(self._look(store, step_s))
        except _Lost as loss:
            self._lose(str(loss))
        except (dist.DistError, RuntimeError, ValueError) as error:
            if not self._closing.is_set():
                self._lose(f"node 0 can't be reached any more: {first_line(error)}")

    def _pass_end_on(self, store: dist.Store) -> None:
        """Have node 0 end the instance if another node was told to end: it alone knows when the requests have ended."""
        if self._node == 0 and store.check([END_KEY]):
            self._voice.hear_end(int(store.get(END_KEY)))
        elif self._node > 0 and self._voice.is_told_to_end():
            store.set(END_KEY, str(self._node))

    def _lose(self, line: str) -> None:
        self._voice.hear(Word(line, is_final=True))
        self._on_loss(line)

    def _look(self, store: dist.Store, step_s: float) -> Word | None:
        """What there is to say about the other nodes. Raises _Lost if the instance can't go on."""
        doubt = None
        for number, other in self._others.items():
            key = f"pulse/{number}"
            if other.take(store.get(key).decode() if store.check([key]) else "", step_s):
                if other.word is not None and other.word.is_final:
                    raise _Lost(other.word.text)
                doubt = doubt or other.word
                continue
            timeout_s = self._timeout_s
            if store.check([SUSPECT_KEY]):
                timeout_s = min(timeout_s, SUSPECT_TIMEOUT_S)
            if other.silent_s > timeout_s:
                raise _Lost(self._describe(store, number, timeout_s))
            if other.silent_s > self._doubt_s:
                doubt = doubt or Word(self._describe(store, number, other.silent_s))
        return doubt

    @staticmethod
    def _describe(store: dist.Store, node: int, silent_s: float) -> str:
        key = f"pulse-of/{node}"
        who = f": {store.get(key).decode()} is stopped, or the node is lost" if store.check([key]) else ""
        return f"node {node} has not been heard of for {silent_s:.0f} s{who}"


class _Other:
    """Another node, as its pulse shows it."""

    def __init__(self) -> None:
        self.word: Word | None = None
        self.silent_s = 0.0
        self._pulse = ""

    def take(self, pulse: str, step_s: float) -> bool:
        """Whether it has beaten since the last look, `step_s` ago."""
        if pulse == self._pulse:
            self.silent_s += step_s
            return False
        self._pulse, self.silent_s = pulse, 0.0
        self.word = Word.parse(pulse.partition(" ")[2])
        return True


class _Lost(Exception):
    """A node has gone, or says that one of its processes hangs."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text; torch's go on with C++ frames."""
    return str(error).strip().split("\n", 1)[0]


def let_loss_be_named(put: Callable[[str, str], None]) -> None:
    """Give the pulses time to say which node has gone; they end the process. `put` writes to the store."""
    with contextlib.suppress(RuntimeError):  # the store went with node 0, which the pulses notice at once
        put(SUSPECT_KEY, "")
    time.sleep(SUSPECT_TIMEOUT_S + 3 * PULSE_PERIOD_S)
